#!/usr/bin/env python3
"""Perplexity over k_chunk, one line for each quantizer: perplexity.csv of a kept run to an SVG.

    scripts/plot_perplexity.py benches/runs/2026-11-27-xeon/perplexity.csv benches/runs/2026-11-27-xeon/perplexity.svg

Columns: quantizer, k_chunk, perplexity. A quantizer with a single row and an empty k_chunk is a level line.
"""
import csv
import sys

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 60, 190, 20, 50
COLOURS = ["#8a8a8a", "#d1495b", "#edae49", "#00798c", "#30638e", "#5f0f40"]


def main(source, target):
    series = {}
    with open(source, newline="") as file:
        for row in csv.DictReader(file):
            k = float(row["k_chunk"]) if row["k_chunk"] else None
            series.setdefault(row["quantizer"], []).append((k, float(row["perplexity"])))
    points = [point for line in series.values() for point in line]
    ks = sorted({k for k, _ in points if k is not None})
    low = 5 * int(min(p for _, p in points) / 5)
    high = 5 * (int(max(p for _, p in points) / 5) + 1)
    x = lambda k: LEFT + ks.index(k) / max(len(ks) - 1, 1) * (WIDTH - LEFT - RIGHT)
    y = lambda p: TOP + (high - p) / (high - low) * (HEIGHT - TOP - BOTTOM)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for p in range(low, high + 1, 5):
        out.append(f'<line x1="{LEFT}" y1="{y(p):.1f}" x2="{WIDTH - RIGHT}" y2="{y(p):.1f}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(p) + 4:.1f}" text-anchor="end">{p}</text>')
    for k in ks:
        out.append(f'<text x="{x(k):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{k:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">k_chunk (channels compensated per 1024)</text>')
    out.append(f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})">perplexity</text>')
    labels = []
    for colour, (name, line) in zip(COLOURS, series.items()):
        if line[0][0] is None:
            line = [(ks[0], line[0][1]), (ks[-1], line[0][1])]
        else:
            line.sort()
            out += [f'<circle cx="{x(k):.1f}" cy="{y(p):.1f}" r="3" fill="{colour}"/>' for k, p in line]
        path = " ".join(f"{x(k):.1f},{y(p):.1f}" for k, p in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        labels.append([y(line[-1][1]), colour, name])
    # Labels beside the lines' ends, moved apart where they would touch.
    labels.sort()
    for above, label in zip(labels, labels[1:]):
        label[0] = max(label[0], above[0] + 15)
    for at, colour, name in labels:
        out.append(f'<text x="{WIDTH - RIGHT + 10}" y="{at + 4:.1f}" fill="{colour}">{name}</text>')
    out.append("</svg>")
    with open(target, "w") as file:
        file.write("\n".join(out) + "\n")


main(*sys.argv[1:3])
