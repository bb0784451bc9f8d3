package quorate

import (
	"os"
	"syscall"
)

// allocate takes space for a file.
func allocate(f *os.File, size int64) error {
	return os.NewSyscallError("fallocate", syscall.Fallocate(int(f.Fd()), 0, 0, size))
}

const punchHole = 0x1 | 0x2 // FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

// giveBack frees the space of a part of a file.
func giveBack(f *os.File, at, size int64) error {
	return os.NewSyscallError("fallocate", syscall.Fallocate(int(f.Fd()), punchHole, at, size))
}
