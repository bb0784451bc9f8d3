//go:build unix && !linux

package quorate

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"
)

type disks struct{}

func newDisks(*testing.T) *disks { return nil }
func (*disks) give(*process)     {}

func withoutDescriptors(time.Duration) error { return errors.ErrUnsupported }

func faultsOfDisks(*testing.T, *rand.Rand, []*process, *disks) []fault { return nil }
