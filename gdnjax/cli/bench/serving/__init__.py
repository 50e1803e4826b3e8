"""What gdnjax bench serve is made of: workloads, driver, engines, a server over HTTP, figures, tables, pictures."""
