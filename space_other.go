//go:build !linux

package quorate

import (
	"errors"
	"os"
)

// allocate would write zeros here, which a file system that compresses or copies does not keep room for.
func allocate(*os.File, int64) error { return errors.ErrUnsupported }

// giveBack frees the space of a part of a file, where that can be done.
func giveBack(*os.File, int64, int64) error { return errors.ErrUnsupported }
