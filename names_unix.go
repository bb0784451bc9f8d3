//go:build unix

package quorate

import (
	"io/fs"
	"syscall"
)

// namesWatched: here an open file can be removed.
const namesWatched = true

// linkCount is how many names an open file has. A file system that does not tell counts as one.
func linkCount(info fs.FileInfo) uint64 {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return uint64(stat.Nlink)
	}
	return 1
}
