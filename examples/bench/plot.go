package main

// The plot: throughput and latency by concurrency, one line for each system, as SVG written by hand. It sees nothing but records.

import (
	"bytes"
	"cmp"
	"fmt"
	"html"
	"math"
	"slices"
)

const (
	panelWidth, panelHeight = 400.0, 260.0 // of the axes
	left, top, gap          = 90.0, 60.0, 100.0
)

// colors are told apart by people who see few (Okabe and Ito).
var colors = map[string]string{"quorate": "#0072b2", "etcd": "#d55e00", "nats": "#009e73", "raft-boltdb": "#cc79a7", "raft-wal": "#e69f00"}

// A panel is one of the plot's diagrams.
type panel struct {
	title string
	verb  string
	value func(record) float64
}

var panels = []panel{
	{"sets a second, on the leader", "set", rate},
	{"99th percentile of a set, ms", "set", p99},
	{"linearizable gets a second, on the leader", "get", rate},
	{"99th percentile of a linearizable get, ms", "get", p99},
}

type point struct{ x, y float64 }

// lines are a panel's points by system, by the number of workers.
func (p panel) lines(cells results) map[string][]point {
	lines := map[string][]point{}
	for name, systems := range cells {
		c, err := parseCell(name)
		if err != nil || c.Verb != p.verb || c.Follower {
			continue
		}
		for system, records := range systems {
			if v, ok := middleOf(records, p.value); ok && v > 0 {
				lines[system] = append(lines[system], point{float64(c.Workers), v})
			}
		}
	}
	for _, points := range lines {
		slices.SortFunc(points, func(a, b point) int { return cmp.Compare(a.x, b.x) })
	}
	return lines
}

func plot(all []record) []byte {
	cells, _ := index(all, byCell)
	out := &bytes.Buffer{}
	width, height := left+2*panelWidth+gap+30, top+2*panelHeight+gap+60
	fmt.Fprintf(out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="13">`+"\n", width, height)
	fmt.Fprintf(out, `<rect width="%.0f" height="%.0f" fill="#fff"/>`+"\n", width, height)
	x := left
	for _, k := range present(all) {
		fmt.Fprintf(out, `<line x1="%.0f" y1="18" x2="%.0f" y2="18" stroke="%s" stroke-width="3"/><text x="%.0f" y="22">%s</text>`+"\n",
			x, x+24, colors[k.name], x+30, html.EscapeString(k.title))
		x += 150
	}
	fmt.Fprintf(out, `<text x="%.0f" y="%.0f" fill="#444">dashed: not linearizable</text>`+"\n", left, height-8)
	for i, p := range panels {
		p.draw(out, left+float64(i%2)*(panelWidth+gap), top+float64(i/2)*(panelHeight+gap), p.lines(cells))
	}
	fmt.Fprintln(out, "</svg>")
	return out.Bytes()
}

// A scale maps values to places along an axis, logarithmically.
type scale struct{ low, high, from, to float64 } // low and high are powers of the base

func (s scale) at(v float64) float64 {
	return s.from + (s.to-s.from)*(math.Log(v)-math.Log(s.low))/(math.Log(s.high)-math.Log(s.low))
}

// draw draws one panel with its upper left corner at x0, y0.
func (p panel) draw(out *bytes.Buffer, x0, y0 float64, lines map[string][]point) {
	fmt.Fprintf(out, `<text x="%.0f" y="%.0f" font-weight="bold">%s</text>`+"\n", x0, y0-10, html.EscapeString(p.title))
	low, high := math.Inf(1), 0.0
	for _, points := range lines {
		for _, pt := range points {
			low, high = min(low, pt.y), max(high, pt.y)
		}
	}
	if high == 0 {
		fmt.Fprintf(out, `<text x="%.0f" y="%.0f" fill="#888">not measured</text>`+"\n", x0+20, y0+40)
		return
	}
	xs := scale{1, 1024, x0 + 12, x0 + panelWidth - 12}
	ys := scale{math.Pow10(int(math.Floor(math.Log10(low)))), math.Pow10(int(math.Floor(math.Log10(high))) + 1), y0 + panelHeight, y0}
	fmt.Fprintf(out, `<rect x="%.0f" y="%.0f" width="%.0f" height="%.0f" fill="none" stroke="#888"/>`+"\n", x0, y0, panelWidth, panelHeight)
	for _, n := range []float64{1, 4, 16, 64, 256, 1024} {
		fmt.Fprintf(out, `<text x="%.1f" y="%.0f" text-anchor="middle" fill="#444">%.0f</text>`+"\n", xs.at(n), y0+panelHeight+18, n)
	}
	fmt.Fprintf(out, `<text x="%.0f" y="%.0f" text-anchor="middle" fill="#444">workers</text>`+"\n", x0+panelWidth/2, y0+panelHeight+36)
	for v := ys.low; v <= ys.high*1.001; v *= 10 {
		y := ys.at(v)
		fmt.Fprintf(out, `<line x1="%.0f" y1="%.1f" x2="%.0f" y2="%.1f" stroke="#ddd"/><text x="%.0f" y="%.1f" text-anchor="end" fill="#444">%s</text>`+"\n",
			x0, y, x0+panelWidth, y, x0-6, y+4, tick(v))
	}
	for _, k := range kinds {
		points := lines[k.name]
		if len(points) == 0 {
			continue
		}
		dashes := ""
		if weaker(p.verb+"/", k.name) {
			dashes = ` stroke-dasharray="6 5"`
		}
		fmt.Fprintf(out, `<polyline fill="none" stroke="%s" stroke-width="2.5"%s points="`, colors[k.name], dashes)
		for _, pt := range points {
			fmt.Fprintf(out, "%.1f,%.1f ", xs.at(pt.x), ys.at(pt.y))
		}
		fmt.Fprintln(out, `"/>`)
		for _, pt := range points {
			fmt.Fprintf(out, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`+"\n", xs.at(pt.x), ys.at(pt.y), colors[k.name])
		}
	}
}

// tick is a power of ten.
func tick(v float64) string {
	if v < 1 {
		return fmt.Sprint(v)
	}
	return comma(int(math.Round(v)))
}
