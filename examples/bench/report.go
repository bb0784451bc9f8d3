package main

// The report: medians over the rounds, beside each other, in Markdown. It sees nothing but records, so that those of several runs can
// be reported together.

import (
	"bufio"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

const ours = "quorate"

func readRecords(paths []string) (all []record, err error) {
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var r record
			if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			all = append(all, r)
		}
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return all, nil
}

// report writes report.md and plot.svg, and prints the first.
func (b *bench) report() error {
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return err
	}
	text := markdown(b.records)
	fmt.Print(text)
	if err := os.WriteFile(filepath.Join(b.out, "report.md"), []byte(text), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.out, "plot.svg"), plot(b.records), 0o644)
}

// results are all records by what they are of and by system.
type results map[string]map[string][]record

func index(all []record, name func(record) string) (found results, order []string) {
	found = results{}
	for _, r := range all {
		n := name(r)
		if n == "" {
			continue
		}
		if found[n] == nil {
			found[n] = map[string][]record{}
			order = append(order, n)
		}
		found[n][r.System] = append(found[n][r.System], r)
	}
	return found, order
}

// middleOf is the median of one property over the records that have it.
func middleOf(all []record, value func(record) float64) (float64, bool) {
	var values []float64
	for _, r := range all {
		if r.Error == "" {
			values = append(values, value(r))
		}
	}
	return median(values), len(values) > 0
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	values = slices.Sorted(slices.Values(values))
	half := len(values) / 2
	if len(values)%2 == 1 {
		return values[half]
	}
	return (values[half-1] + values[half]) / 2
}

func byCell(r record) string   { return r.Cell }
func byFigure(r record) string { return r.Figure }
func rate(r record) float64    { return r.Rate }
func p50(r record) float64     { return inMillis(r.P50) }
func p99(r record) float64     { return inMillis(r.P99) }
func value(r record) float64   { return r.Value }

func markdown(all []record) string {
	out := &strings.Builder{}
	for _, r := range all {
		if r.About != nil {
			r.About.write(out)
		}
	}
	cells, order := index(all, byCell)
	order = slices.DeleteFunc(order, func(name string) bool { _, err := parseCell(name); return err != nil }) // costs, and starts that failed
	shown := present(all)
	if len(order) > 0 {
		fmt.Fprintf(out, "\n## Operations a second\n\nMore is better; the last column is quorate's figure divided by that of the best peer.\n\n")
		table(out, shown, order, cells, cellName, rate, number3, true)
		fmt.Fprintf(out, "\n## Median latency, ms\n\n")
		table(out, shown, order, cells, cellName, p50, number3, false)
		fmt.Fprintf(out, "\n## 99th percentile of latency, ms\n\nLess is better; above 1 in the last column quorate is slower than the best peer.\n\n")
		table(out, shown, order, cells, cellName, p99, number3, false)
		writeCosts(out, shown, cells, order)
	}
	writeLife(out, shown, all)
	writeGrowth(out, cells)
	writeFaults(out, all)
	return out.String()
}

func (a *about) write(out *strings.Builder) {
	fmt.Fprintf(out, "Three members of each system on one machine: %d CPUs, %s, Linux %s, %s; a write of 4 KiB with fdatasync takes %s ms there.\n",
		a.CPUs, a.FS, a.Kernel, a.Go, millis(a.Fsync))
	fmt.Fprintf(out, "Medians of %d rounds of %v after %v of warm-up, lives of %d; %d keys of %d bytes, values of %d bytes.\n",
		a.Rounds, a.Cell, a.Warmup, a.LifeRuns, cellKeys, keyBytes, valueBytes)
	var versions []string
	for _, k := range kinds {
		if v := a.Versions[k.module]; v != "" && k.name != ours {
			versions = append(versions, k.module+" "+v)
		}
	}
	versions = append(versions, "github.com/hashicorp/raft "+a.Versions["github.com/hashicorp/raft"])
	fmt.Fprintf(out, "Versions: %s.\n", strings.Join(versions, ", "))
}

// present are the systems that have results, in their usual order.
func present(all []record) (shown []kind) {
	for _, k := range kinds {
		if slices.ContainsFunc(all, func(r record) bool { return r.System == k.name }) {
			shown = append(shown, k)
		}
	}
	return shown
}

// table has a line for each name of rows and a column for each system; more says whether the highest value is the best.
func table(out *strings.Builder, shown []kind, rows []string, found results, title func(string) string,
	value func(record) float64, format func(float64) string, more bool) {
	head(out, shown, "against the best peer")
	for _, row := range rows {
		fmt.Fprintf(out, "| %s |", title(row))
		own, best := math.NaN(), math.NaN()
		for _, k := range shown {
			v, ok := middleOf(found[row][k.name], value)
			weak := weaker(row, k.name)
			switch {
			case len(found[row][k.name]) == 0:
				fmt.Fprint(out, " – |")
				continue
			case !ok:
				fmt.Fprint(out, " failed |")
				continue
			case weak:
				fmt.Fprintf(out, " %s * |", format(v))
			default:
				fmt.Fprintf(out, " %s |", format(v))
			}
			switch {
			case k.name == ours:
				own = v
			case weak: // no peer in this: it promises less
			case math.IsNaN(best) || more == (v > best):
				best = v
			}
		}
		if ratio := own / best; math.IsNaN(ratio) || math.IsInf(ratio, 0) {
			fmt.Fprint(out, " |\n")
		} else {
			fmt.Fprintf(out, " %s× |\n", number3(ratio))
		}
	}
	if slices.ContainsFunc(rows, func(row string) bool { return weaker(row, "nats") && found[row]["nats"] != nil }) {
		fmt.Fprint(out, "\n\\* Not linearizable: NATS has no such read. This is the answer of the stream's leader, which asks nobody; it is not counted as a peer here.\n")
	}
}

func head(out *strings.Builder, shown []kind, last string) {
	fmt.Fprint(out, "| |")
	for _, k := range shown {
		fmt.Fprintf(out, " %s |", k.title)
	}
	fmt.Fprintf(out, " %s |\n|---|%s\n", last, strings.Repeat("---:|", len(shown)+1))
}

// weaker tells whether a system promises less in a cell than the cell asks for.
func weaker(row, system string) bool {
	return system == "nats" && (strings.HasPrefix(row, "get/") || strings.HasPrefix(row, "mix/"))
}

func cellName(name string) string {
	c, err := parseCell(name)
	if err != nil {
		return name
	}
	verb := map[string]string{"set": "set", "insert": "insert", "get": "linearizable get", "stale": "stale get", "mix": "95 % linearizable get, 5 % set"}[c.Verb]
	where := "leader"
	if c.Follower {
		where = "follower"
	}
	return fmt.Sprintf("%s, %d on the %s", verb, c.Workers, where)
}

// writeCosts is what writes cost the machine, beside their time.
func writeCosts(out *strings.Builder, shown []kind, cells results, order []string) {
	var rows []string
	for _, name := range order {
		if c, err := parseCell(name); err == nil && c.writes() && !c.Follower {
			rows = append(rows, name)
		}
	}
	if len(rows) == 0 {
		return
	}
	for _, t := range []struct {
		title, text string
		value       func(record) float64
	}{
		{"CPU for a write on the leader, µs", "With the driver's part, which runs there.", func(r record) float64 { return r.CPULeader }},
		{"CPU for a write on a follower, µs", "", func(r record) float64 { return r.CPUFollower }},
		{"Bytes that a member writes for a byte of key and value", "Up to the end of the cell; what a system writes later is not in it.", func(r record) float64 { return r.Written }},
	} {
		fmt.Fprintf(out, "\n## %s\n\n", t.title)
		if t.text != "" {
			fmt.Fprintf(out, "%s\n\n", t.text)
		}
		table(out, shown, rows, cells, cellName, t.value, number3, false)
	}
}

func writeLife(out *strings.Builder, shown []kind, all []record) {
	figures, _ := index(all, byFigure)
	if len(figures) == 0 {
		return
	}
	rows := slices.SortedFunc(maps.Keys(figures), func(a, b string) int {
		if order := figurePlace(a) - figurePlace(b); order != 0 {
			return order
		}
		return strings.Compare(a, b)
	})
	rows = slices.DeleteFunc(rows, func(name string) bool { return name == "life" }) // it only ever says what has failed
	if len(rows) == 0 {
		return
	}
	fmt.Fprintf(out, "\n## Life\n\nLess is better; below 1 in the last column quorate is ahead of the best peer.\n\n")
	table(out, shown, rows, figures, figureName, value, number3, false)
}

var figureTitles = []struct{ prefix, title string }{
	{"start", "first acknowledged write after the start of three empty members, ms"},
	{"failover", "writes are acknowledged again after SIGKILL of the leader, ms"},
	{"load", "time for each key of a load up to %s keys by 256 writers, µs"},
	{"restart", "restarted member holds all that was written, %s keys, ms"},
	{"answers", "and answers linearizable reads, %s keys, ms"},
	{"rss", "memory of a member (RSS), %s keys, MiB"},
	{"disk", "disk of a member, %s keys, MiB"},
	{"idle", "CPU of a member that does nothing, %s keys, ms a second"},
	{"stall plain", "longest of 16 writers' writes in 7 s, %s keys, ms"},
	{"stall snapshot", "the same while a snapshot is taken, %s keys, ms"},
	{"stall replace", "the same while a member is sent the state, %s keys, ms"},
	{"replace", "member with an empty disk holds the state, %s keys, ms"},
}

// figurePlace finds the title of a figure, "stall/100000/plain".
func figurePlace(figure string) int {
	parts := strings.Split(figure, "/")
	name := parts[0]
	if len(parts) == 3 {
		name += " " + parts[2]
	}
	for i, t := range figureTitles {
		if t.prefix == name {
			size, _ := strconv.Atoi(append(parts, "")[1])
			return i + size/1000*len(figureTitles) // all figures of one size together
		}
	}
	return -1
}

func figureName(figure string) string {
	place := figurePlace(figure)
	if place < 0 {
		return figure
	}
	title := figureTitles[place%len(figureTitles)].title
	if strings.Contains(title, "%s") {
		size, _ := strconv.Atoi(strings.Split(figure, "/")[1])
		title = fmt.Sprintf(title, comma(size))
	}
	return title
}

// writeGrowth is what a write of quorate costs as the state grows.
func writeGrowth(out *strings.Builder, cells results) {
	var rows []string
	for _, size := range costSizes {
		if name := fmt.Sprint("cost/", size); cells[name] != nil {
			rows = append(rows, name)
		}
	}
	if len(rows) == 0 {
		return
	}
	fmt.Fprintf(out, "\n## quorate: sets by 64 writers on the leader, of any of so many keys\n\n"+
		"| keys | sets a second | p99, ms | CPU on the leader, µs | on a follower, µs | bytes written for a byte |\n|---:|---:|---:|---:|---:|---:|\n")
	for _, row := range rows {
		size, _ := strconv.Atoi(strings.TrimPrefix(row, "cost/"))
		fmt.Fprintf(out, "| %s |", comma(size))
		for _, value := range []func(record) float64{rate, p99, func(r record) float64 { return r.CPULeader },
			func(r record) float64 { return r.CPUFollower }, func(r record) float64 { return r.Written }} {
			v, _ := middleOf(cells[row][ours], value)
			fmt.Fprintf(out, " %s |", number3(v))
		}
		fmt.Fprintln(out)
	}
}

// writeFaults says what casts doubt on the figures above: errors, wrong answers, a leader that moved, a busy machine, spread.
func writeFaults(out *strings.Builder, all []record) {
	fmt.Fprintf(out, "\n## What went wrong\n\n")
	var spreads, elsewhere []float64
	errors, wrong, moved := 0, 0, 0
	var lines []string
	for _, r := range all {
		name := r.Cell + r.Figure
		if r.Error != "" {
			lines = append(lines, fmt.Sprintf("- %s, %s, round %d: %s", r.System, name, r.Round, r.Error))
		}
		if r.Errors > 0 {
			errors++
			lines = append(lines, fmt.Sprintf("- %s, %s, round %d: %d errors, the first: %s", r.System, name, r.Round, r.Errors, r.FirstError))
		}
		if r.Wrong > 0 {
			wrong++
			lines = append(lines, fmt.Sprintf("- **%s, %s, round %d: %d wrong answers, the first: %s**", r.System, name, r.Round, r.Wrong, r.FirstBad))
		}
		if r.Moved {
			moved++
			lines = append(lines, fmt.Sprintf("- %s, %s, round %d: the leader moved", r.System, name, r.Round))
		}
		if r.Cell != "" && r.Error == "" {
			elsewhere = append(elsewhere, r.Elsewhere*100)
		}
	}
	cells, _ := index(all, byCell)
	for _, systems := range cells {
		for _, rounds := range systems {
			if len(rounds) > 1 {
				spreads = append(spreads, spread(rounds))
			}
		}
	}
	if len(lines) == 0 {
		lines = []string{"Nothing: no operation failed, every value that was read was whole, and every acknowledged write that was looked for was there."}
	}
	fmt.Fprintln(out, strings.Join(lines, "\n"))
	if len(elsewhere) > 0 {
		fmt.Fprintf(out, "\nOf the machine's CPUs, others than the measured cluster used %s %% in the median cell and %s %% in the worst.\n",
			number3(median(elsewhere)), number3(slices.Max(elsewhere)))
	}
	if len(spreads) > 0 {
		fmt.Fprintf(out, "Highest and lowest rate of a cell's rounds are %s %% of the median apart in the median cell, %s %% in the worst.\n",
			number3(median(spreads)), number3(slices.Max(spreads)))
	}
}

func spread(rounds []record) float64 {
	low, high := math.Inf(1), 0.0
	for _, r := range rounds {
		if r.Error == "" {
			low, high = min(low, r.Rate), max(high, r.Rate)
		}
	}
	if mid, ok := middleOf(rounds, rate); ok && mid > 0 {
		return (high - low) / mid * 100
	}
	return 0
}

// number3 writes three digits that matter: 12,300, 45.6, 0.789.
func number3(v float64) string {
	switch {
	case v == 0 || math.IsNaN(v) || math.IsInf(v, 0):
		return "0"
	case math.Abs(v) >= 99.95:
		unit := math.Pow10(max(0, int(math.Floor(math.Log10(math.Abs(v))))-2))
		return comma(int(math.Round(v/unit) * unit))
	}
	return strconv.FormatFloat(v, 'f', max(0, 2-int(math.Floor(math.Log10(math.Abs(v))))), 64)
}

func millis(d time.Duration) string { return number3(inMillis(d)) }

func comma(n int) string {
	if n < 1000 {
		return strconv.Itoa(n)
	}
	return fmt.Sprintf("%s,%03d", comma(n/1000), n%1000)
}
