//go:build unix

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"image"
	"image/draw"
	"image/png"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// The program as a reader runs it, in a real browser: Chromium without a window, driven over the DevTools protocol.

var update = flag.Bool("update", false, "take page.png anew")

// runEnv makes the test binary the program, and so its members' processes.
const runEnv = "QUORATE_FLAGS_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(runEnv) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestThreePages(t *testing.T) {
	needChromium(t)
	b := startBrowser(t)
	program := startProgram(t)
	var all []*page
	for _, url := range program.urls {
		all = append(all, b.open(url))
	}
	one, two, three := all[0], all[1], all[2]
	for _, p := range all {
		p.await("get('state').textContent", "It reads and writes.")
		p.await("list.innerText.replace(/\\s+/g, ' ')", "dark-mode version 1 off ✕ new-checkout version 2 off ✕ search-v2 version 3 off ✕")
		p.checkNames()
	}

	one.click("find('dark-mode').querySelector('.switch')")
	for _, p := range all {
		p.await(checked("dark-mode"), "true")
	}
	three.click("find('dark-mode').querySelector('.switch')")
	for _, p := range all {
		p.await(checked("dark-mode"), "false")
	}

	two.eval("void ask('PUT', flagPath('dark-mode', 1), 'on')") // as if another page's click had come first
	two.await("get('answer').textContent.split(':')[0]", "Not done")

	for _, p := range all {
		if shift := p.eval("String(shifted)"); shift != "0" {
			t.Errorf("%s: what is shown has moved by itself: layout shift %s", p.url, shift)
		}
	}

	two.eval("get('add').elements.name.value = 'beta'")
	two.click("get('add').querySelector('button')")
	for _, p := range all {
		p.await(checked("beta"), "false")
	}
	one.click("find('beta').querySelector('.remove')")
	for _, p := range all {
		p.await("String(find('beta'))", "undefined")
	}

	three.eval("(add('gone'), last = '0', listen())") // as a page that was away for longer than the history reaches back
	three.await("String(find('gone'))", "undefined")
	three.await(checked("search-v2"), "false")

	leader := 0
	for i, p := range all {
		if p.eval("get('role').textContent") == "leader" {
			leader = i
		}
	}
	killed, left, right := all[leader], all[(leader+1)%3], all[(leader+2)%3]
	button := fmt.Sprintf("members[%d].querySelector('button')", leader)
	left.await(button+".ariaLabel", fmt.Sprintf("Kill member %d", leader+1))
	left.click(button)
	killed.await("get('state').textContent.split('.')[0]", "This member does not answer")
	right.click("find('search-v2').querySelector('.switch')") // waits for the next leader
	left.await(checked("search-v2"), "true")
	for _, p := range []*page{left, right} {
		p.await(button+".ariaLabel", fmt.Sprintf("Start member %d", leader+1))
		p.await(fmt.Sprintf("members[%d].querySelector('.heard').textContent.split(' ')[0]", leader), "silent")
	}
	if *update {
		screenshot(t, all, "page.png")
	}
	right.click(button)
	killed.await("get('state').textContent", "It reads and writes.")
	killed.await(checked("search-v2"), "true")
	left.await(button+".ariaLabel", fmt.Sprintf("Kill member %d", leader+1))

	program.interrupt() // with the pages open: their streams must not hold it up
	b.close()
}

func checked(name string) string {
	return fmt.Sprintf("String(find('%s')?.querySelector('.switch').ariaChecked)", name)
}

func needChromium(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("chromium"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("install chromium (the Debian package has that name)")
		}
		t.Skip("no chromium: install the package of that name")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type program struct {
	t    *testing.T
	tmp  string
	cmd  *exec.Cmd
	urls []string
}

// startProgram returns once the program has said where the pages are.
func startProgram(t *testing.T) *program {
	t.Helper()
	p := &program{t: t, tmp: t.TempDir(), cmd: exec.Command(os.Args[0])}
	p.cmd.Env = append(os.Environ(), runEnv+"=1", "TMPDIR="+p.tmp)
	p.cmd.Stderr = os.Stderr
	stdout, err := p.cmd.StdoutPipe()
	must(t, err)
	must(t, p.cmd.Start())
	t.Cleanup(func() { p.cmd.Process.Kill(); p.cmd.Wait() }) // its members end with it
	said := make(chan []string)
	go func() {
		var urls []string
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if url, ok := strings.CutPrefix(lines.Text(), "  http"); ok {
				urls = append(urls, "http"+url)
			}
			if strings.HasPrefix(lines.Text(), "Ctrl-C") {
				said <- urls
			}
		}
	}()
	select {
	case p.urls = <-said:
	case <-time.After(30 * time.Second):
	}
	if len(p.urls) != 3 {
		t.Fatalf("the program names these pages: %q", p.urls)
	}
	return p
}

// interrupt is Ctrl-C.
func (p *program) interrupt() {
	p.t.Helper()
	must(p.t, p.cmd.Process.Signal(os.Interrupt))
	late := time.AfterFunc(15*time.Second, func() { p.cmd.Process.Kill() })
	defer late.Stop()
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("the program ended with %v", err)
	}
	if left, err := os.ReadDir(p.tmp); err != nil || len(left) > 0 {
		p.t.Errorf("the program has left %v, %v", left, err)
	}
}

// A browser is spoken to through two pipes, in JSON messages that each end with a NUL.
type browser struct {
	t   *testing.T
	cmd *exec.Cmd
	to  *os.File

	mu       sync.Mutex             // guards the fields below
	sent     int                    // the last message's id
	waiting  map[int]chan<- message // by id
	problems []string               // that pages have met
}

type message struct {
	ID        int             `json:"id,omitempty"`
	SessionID string          `json:"sessionId,omitempty"`
	Method    string          `json:"method,omitempty"`
	Params    any             `json:"params,omitempty"`
	Result    json.RawMessage `json:"result,omitempty"`
	Error     json.RawMessage `json:"error,omitempty"`
}

func startBrowser(t *testing.T) *browser {
	t.Helper()
	in, to, err := os.Pipe()
	must(t, err)
	from, out, err := os.Pipe()
	must(t, err)
	b := &browser{t: t, to: to, waiting: make(map[int]chan<- message)}
	b.cmd = exec.Command("chromium", "--headless", "--hide-scrollbars", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-quic",
		"--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
		"--user-data-dir="+filepath.Join(t.TempDir(), "chromium"))
	b.cmd.ExtraFiles = []*os.File{in, out} // 3 and 4 there
	// A pipe that its own processes inherit, so that Wait returns when the last of them has ended: they write to the directory.
	b.cmd.Stderr, b.cmd.WaitDelay = io.Discard, 10*time.Second
	must(t, b.cmd.Start())
	in.Close()
	out.Close()
	t.Cleanup(b.close)
	go b.receive(from)
	return b
}

func (b *browser) receive(from *os.File) {
	defer from.Close()
	for r := bufio.NewReader(from); ; {
		data, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		data = data[:len(data)-1]
		var m message
		if err := json.Unmarshal(data, &m); err != nil {
			m.Method = "Runtime.exceptionThrown"
		}
		b.mu.Lock()
		if m.Method == "Runtime.exceptionThrown" {
			b.problems = append(b.problems, string(data))
		}
		if answer, ok := b.waiting[m.ID]; ok {
			answer <- m // it has room
			delete(b.waiting, m.ID)
		}
		b.mu.Unlock()
	}
}

// call has the browser do something, or one page of it, and fills in what it says to that.
func (b *browser) call(session, method string, params, result any) {
	b.t.Helper()
	answer := make(chan message, 1)
	b.mu.Lock()
	b.sent++
	id := b.sent
	b.waiting[id] = answer
	b.mu.Unlock()
	data, err := json.Marshal(message{ID: id, SessionID: session, Method: method, Params: params})
	must(b.t, err)
	_, err = b.to.Write(append(data, 0))
	must(b.t, err)
	select {
	case m := <-answer:
		if m.Error != nil {
			b.t.Fatalf("%s: %s", data, m.Error)
		}
		if result != nil {
			must(b.t, json.Unmarshal(m.Result, result))
		}
	case <-time.After(20 * time.Second):
		b.t.Fatalf("%s: no answer", data)
	}
}

// close ends the browser, and fails the test for what its pages have met.
func (b *browser) close() {
	if b.cmd == nil {
		return
	}
	b.to.Close()
	b.cmd.Process.Kill()
	b.cmd.Wait()
	b.cmd = nil
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.problems {
		b.t.Errorf("in a page: %s", p)
	}
}

type object map[string]any

type page struct {
	b            *browser
	url, session string
}

// open opens a page in a window of its own, so that none of them is in the background.
func (b *browser) open(url string) *page {
	b.t.Helper()
	var target struct{ TargetID string }
	b.call("", "Target.createTarget", object{"url": "about:blank", "newWindow": true, "width": 900, "height": 700}, &target)
	p := &page{b: b, url: url}
	var attached struct{ SessionID string }
	b.call("", "Target.attachToTarget", object{"targetId": target.TargetID, "flatten": true}, &attached)
	p.session = attached.SessionID
	b.call(p.session, "Runtime.enable", nil, nil)
	b.call(p.session, "Page.enable", nil, nil)
	b.call(p.session, "Page.addScriptToEvaluateOnNewDocument", object{"source": `var shifted = 0; new PerformanceObserver(seen => {
		for (const shift of seen.getEntries()) if (!shift.hadRecentInput) shifted += shift.value
	}).observe({ type: 'layout-shift', buffered: true })`}, nil)
	b.call(p.session, "Page.navigate", object{"url": url}, nil)
	return p
}

// eval is an expression's value, a string.
func (p *page) eval(expression string) string {
	p.b.t.Helper()
	text, err := p.try(expression)
	if err != nil {
		p.b.t.Fatalf("%s: %s: %v", p.url, expression, err)
	}
	return text
}

func (p *page) try(expression string) (string, error) {
	p.b.t.Helper()
	var answer struct {
		Result           struct{ Value string }
		ExceptionDetails *struct{ Exception struct{ Description string } }
	}
	p.b.call(p.session, "Runtime.evaluate", object{"expression": expression, "returnByValue": true}, &answer)
	if e := answer.ExceptionDetails; e != nil {
		return "", errors.New(e.Exception.Description)
	}
	return answer.Result.Value, nil
}

func (p *page) click(element string) {
	p.b.t.Helper()
	p.eval(element + ".click()")
}

// await waits until the expression has this value: the page is repainted by what it is sent.
func (p *page) await(expression, want string) {
	p.b.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		got, err := p.try(expression)
		if err == nil && got == want {
			return
		}
		if time.Now().After(end) {
			p.b.t.Fatalf("%s: %s is %q, %v, want %q", p.url, expression, got, err, want)
		}
	}
}

// checkNames: who can't see the page hears what each control is for.
func (p *page) checkNames() {
	p.b.t.Helper()
	var tree struct {
		Nodes []struct {
			Role, Name struct{ Value any }
		}
	}
	p.b.call(p.session, "Accessibility.getFullAXTree", nil, &tree)
	controls := 0
	for _, n := range tree.Nodes {
		switch n.Role.Value {
		case "button", "switch", "textbox", "link":
			controls++
			if n.Name.Value == "" {
				p.b.t.Errorf("%s: a %v has no name", p.url, n.Role.Value)
			}
		}
	}
	if controls < 10 {
		p.b.t.Errorf("%s: only %d controls are named", p.url, controls)
	}
}

// screenshot writes the pages, side by side, to file.
func screenshot(t *testing.T, all []*page, file string) {
	t.Helper()
	const width, height = 400, 785
	whole := image.NewRGBA(image.Rect(0, 0, width*len(all), height))
	for i, p := range all {
		p.b.call(p.session, "Emulation.setDeviceMetricsOverride", object{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false}, nil)
		var shot struct{ Data []byte }
		p.b.call(p.session, "Page.captureScreenshot", object{"format": "png"}, &shot)
		one, err := png.Decode(bytes.NewReader(shot.Data))
		must(t, err)
		draw.Draw(whole, image.Rect(i*width, 0, (i+1)*width, height), one, image.Point{}, draw.Src)
	}
	var data bytes.Buffer
	must(t, (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&data, whole))
	must(t, os.WriteFile(file, data.Bytes(), 0o644))
}
