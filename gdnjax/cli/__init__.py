"""The commands of the package: `gdnjax generate`, `gdnjax convert`, and what they share with those of scripts/."""
