"""A trend as inline SVG, in the colours of the page: no library, no other host, the same bytes for the same numbers."""

import datetime
import html

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 24


def number(value: float) -> str:
    """As short as it can be said: 38,400, 13.7, 0.22."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def trend(points: list[tuple[str, float]], label: str) -> str:
    """Values over time, as (time in ISO form, value), oldest first. The axis begins at 0 unless all lie close together,
    and never shows less than a fifth of the value, or noise would look like news.

    A title on each point says what it is, for who points at it and for who hears the page.
    """
    times = [_seconds(time) for time, _ in points]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    low = 0.0 if low < 0.8 * high else min(low, 0.85 * high)
    high = high * 1.05 or 1.0
    first, last = times[0], times[-1]

    def x(time: float) -> float:
        share = 0.5 if last == first else (time - first) / (last - first)
        return round(LEFT + 6 + share * (WIDTH - LEFT - RIGHT - 12), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    base = HEIGHT - BOTTOM
    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    # Two marks that would cover one another become one: the newest.
    marks = {min(values), max(values)}
    if max(map(y, marks)) - min(map(y, marks)) < 14:
        marks = {values[-1]}
    for mark in sorted(marks):
        parts.append(f'<line class="axis" x1="{LEFT}" y1="{y(mark)}" x2="{WIDTH - RIGHT}" y2="{y(mark)}"/>')
        parts.append(f'<text text-anchor="end" x="{LEFT - 5}" y="{y(mark) + 4:.1f}">{number(mark)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>')
    days = [points[0][0][:10]] if points[0][0][:10] == points[-1][0][:10] else [points[0][0][:10], points[-1][0][:10]]
    if len(days) == 1:
        parts.append(f'<text text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{days[0]}</text>')
    else:
        parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{days[0]}</text>')
        parts.append(f'<text text-anchor="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}">{days[1]}</text>')
    if len(points) > 1:
        line = " ".join(f"{x(time)},{y(value)}" for time, value in zip(times, values, strict=True))
        parts.append(f'<polyline class="line" points="{line}"/>')
    for (time, value), at in zip(points, times, strict=True):
        title = f"{time[:10]}: {number(value)}"
        parts.append(f'<circle class="point" cx="{x(at)}" cy="{y(value)}" r="3.5"><title>{title}</title></circle>')
    return "".join(parts) + "</svg>"


def _seconds(time: str) -> float:
    moment = datetime.datetime.fromisoformat(time)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
