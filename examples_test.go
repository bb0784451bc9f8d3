package quorate

import (
	"bufio"
	"context"
	"fmt"
	"go/format"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// The examples, run as a reader of the README runs them: its programs, its shell lines, its output.

// readmeBlocks are the fenced blocks of README.md in this language.
func readmeBlocks(t *testing.T, language string) []string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	must(t, err)
	var blocks []string
	for _, m := range regexp.MustCompile("(?s)\n```"+language+"\n(.*?)```\n").FindAllStringSubmatch(string(text), -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

// readmeSession is the console block that holds this text, as commands with their output.
func readmeSession(t *testing.T, text string) (commands, outputs []string) {
	t.Helper()
	for _, b := range readmeBlocks(t, "console") {
		if !strings.Contains(b, text) {
			continue
		}
		for line := range strings.Lines(b) {
			if command, ok := strings.CutPrefix(line, "$ "); ok {
				commands, outputs = append(commands, strings.TrimSpace(command)), append(outputs, "")
			} else {
				outputs[len(outputs)-1] += line
			}
		}
		return commands, outputs
	}
	t.Fatalf("README.md has no console block with %q", text)
	return nil, nil
}

// TestExamplesTakeErrors: what a reader copies neither drops the error of a loop nor asks for a prefix with LIKE.
func TestExamplesTakeErrors(t *testing.T) {
	t.Parallel()
	code := map[string]string{"README.md": strings.Join(readmeBlocks(t, "go"), "\n")}
	files, err := filepath.Glob("examples/*/*.go")
	must(t, err)
	for _, file := range append(files, "example_test.go") {
		text, err := os.ReadFile(file)
		must(t, err)
		code[file] = string(text)
	}
	for file, text := range code {
		if m := regexp.MustCompile(`for \w+ := range .*\.(List|Watch)\(`).FindString(text); m != "" {
			t.Errorf("%s drops an error: %s", file, m)
		}
		if m := regexp.MustCompile(`LIKE '[^%']*%'`).FindString(text); m != "" {
			t.Errorf("%s asks for a prefix with %s", file, m)
		}
	}
}

// buildExample builds an example into a new directory, where its shell lines then run.
func buildExample(t *testing.T, name string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if out, err := exec.Command("go", "build", "-o", filepath.Join(dir, name), "./examples/"+name).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

func needShell(t *testing.T) {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("the README's lines are for a Unix shell")
	}
	if _, err := exec.LookPath("sqlite3"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("install sqlite3 (the Debian package has that name)")
		}
		t.Skip("no sqlite3: install the package of that name")
	}
}

func TestReadmeShowsTheExamples(t *testing.T) {
	blocks := readmeBlocks(t, "go")
	for i, want := range []struct {
		name  string
		lines int
	}{{"quickstart", 25}, {"trio", 35}} {
		file, err := os.ReadFile(filepath.Join("examples", want.name, "main.go"))
		must(t, err)
		if i >= len(blocks) || blocks[i] != string(file) {
			t.Errorf("program %d of README.md is not examples/%s/main.go", i+1, want.name)
		}
		if formatted, err := format.Source(file); err != nil || string(formatted) != string(file) {
			t.Errorf("%s is not formatted: %v", want.name, err)
		}
		n := 0
		for line := range strings.Lines(string(file)) {
			if strings.TrimSpace(line) != "" {
				n++
			}
		}
		if n > want.lines {
			t.Errorf("%s has %d lines, and may have %d", want.name, n, want.lines)
		}
	}
}

// The other fragments are lines of the tour, where they are compiled and run.
func TestReadmeShowsTheTour(t *testing.T) {
	tour, err := os.ReadFile("examples/tour/main.go")
	must(t, err)
	for _, block := range readmeBlocks(t, "go")[2:] {
		if !strings.Contains(string(tour), "\n"+block) {
			t.Errorf("these lines of README.md are not in examples/tour/main.go:\n%s", block)
		}
	}
}

func TestExampleQuickstart(t *testing.T) { readmeExample(t, "quickstart") }
func TestExampleTour(t *testing.T)       { readmeExample(t, "tour") }

// readmeExample runs the README's lines about an example and compares what they say.
func readmeExample(t *testing.T, name string) {
	needShell(t)
	dir := buildExample(t, name)
	commands, outputs := readmeSession(t, "./examples/"+name)
	for i, command := range commands {
		cmd := exec.Command("sh", "-c", strings.Replace(command, "go run ./examples/"+name, "./"+name, 1))
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil || string(out) != outputs[i] {
			t.Errorf("%s: %v\n%swant\n%s", command, err, out, outputs[i])
		}
	}
}

// TestExampleTrio starts three members with the README's lines, on other ports.
func TestExampleTrio(t *testing.T) {
	needShell(t)
	dir := buildExample(t, "trio")
	commands, outputs := readmeSession(t, "./examples/trio")
	var replace []string
	for _, port := range []string{"7001", "7002", "7003"} {
		addr := freeAddr(t)
		replace = append(replace, port, addr[strings.LastIndex(addr, ":")+1:])
	}
	ports := strings.NewReplacer(replace...)
	all := ports.Replace("127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003")
	var members []*exec.Cmd
	var said []<-chan string
	for i, command := range commands {
		line := ports.Replace(command)
		switch {
		case strings.HasPrefix(command, "go build"):
			continue // done
		case strings.HasPrefix(command, "./trio"):
			if !strings.Contains(command, "-port") { // the default is taken, or may be
				line += " -port " + replace[1]
			}
			member, lines := startTrio(t, dir, line+" -members "+all)
			members, said = append(members, member), append(said, lines)
		default:
			for i, lines := range said { // they wait for each other
				awaitTrio(t, i+1, lines)
			}
			said = nil
			rows := ports.Replace(anyTime.ReplaceAllString(outputs[i], "|TIME|N"))
			eventually(t, 20*time.Second, line, func() error {
				cmd := exec.Command("sh", "-c", line)
				cmd.Dir = dir
				out, err := cmd.CombinedOutput()
				got := anyTime.ReplaceAllString(string(out), "|TIME|N")
				if err == nil && sortedLines(got) != sortedLines(rows) {
					err = fmt.Errorf("got\n%swant\n%s", got, rows)
				}
				return err
			})
		}
	}
	for i, m := range members { // Ctrl-C, one after the other
		must(t, m.Process.Signal(os.Interrupt))
		if err := m.Wait(); err != nil {
			t.Errorf("member %d ended with %v", i+1, err)
		}
	}
}

// sortedLines: the order of the rows follows from the ports.
func sortedLines(s string) string {
	lines := strings.Split(s, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// anyTime is a time and a version in a row: which of the members writes first is chance.
var anyTime = regexp.MustCompile(`\|\d\d:\d\d:\d\d\|\d`)

// startTrio starts a member and gives what it says.
func startTrio(t *testing.T, dir, line string) (*exec.Cmd, <-chan string) {
	t.Helper()
	cmd := exec.Command("sh", "-c", "exec "+line)
	cmd.Dir = dir
	stderr, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill() })
	lines := make(chan string, 2)
	go func() {
		r := bufio.NewReader(stderr)
		for range 2 {
			text, _ := r.ReadString('\n')
			lines <- text
		}
	}()
	return cmd, lines
}

// awaitTrio returns once a member has said that it works.
func awaitTrio(t *testing.T, number int, lines <-chan string) {
	t.Helper()
	for _, end := range []string{" waits for the others, for an hour at most\n", "; Ctrl-C ends this one\n"} {
		select {
		case text := <-lines:
			if !strings.HasSuffix(text, end) {
				t.Fatalf("member %d says %q", number, text)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("member %d says nothing", number)
		}
	}
}

// runExample runs an example as it is, with its directories in one that the test removes.
func runExample(t *testing.T, name string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "run", "./examples/"+name)
	cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

func TestExampleEmbedded(t *testing.T) {
	t.Parallel()
	out := runExample(t, "embedded")
	for _, want := range []string{"insert jobs/42 = ann: done\n", "insert jobs/42 = bob: precondition not satisfied\n",
		"get missing: \"\", nil: true\n", "  id\n  snap\n", "opened again: color = blue\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

func TestExampleCluster(t *testing.T) {
	t.Parallel()
	out := runExample(t, "cluster")
	m := regexp.MustCompile(`(?m)^check +([0-9,]+) acknowledged, ([0-9,]+) present on all three, hashes equal`).FindStringSubmatch(out)
	if m == nil || m[1] != m[2] || m[1] == "0" {
		t.Errorf("no equal counts in\n%s", out)
	}
	t.Log("\n" + out)
}
