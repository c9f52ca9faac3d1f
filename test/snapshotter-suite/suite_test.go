// Package suite runs containerd's own snapshotter test suite against ovms-snapshotter, the way containerd
// talks to it: through its proxy client over a Unix socket. Every test gets a daemon and a root of its own.
package suite

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const patience = 30 * time.Second

// overlay is the name by which the suite knows snapshotters with the limits of overlayfs: a directory of a
// lower layer cannot be renamed. It is what ordinary images get from ovms.
const overlay = "overlayfs"

func TestSuite(t *testing.T) {
	program := os.Getenv("OVMS_SNAPSHOTTER")
	if program == "" {
		t.Fatal("OVMS_SNAPSHOTTER must name the ovms-snapshotter to test")
	}
	testsuite.SnapshotterSuite(t, overlay, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		return start(ctx, program, root)
	})
}

// start runs a daemon below root and returns a client of it and a function that ends both.
func start(ctx context.Context, program, root string) (snapshots.Snapshotter, func() error, error) {
	// A socket's path must be short, and root may be long.
	dir, err := os.MkdirTemp("", "os")
	if err != nil {
		return nil, nil, err
	}
	settings := filepath.Join(dir, "ovms.toml")
	socket := filepath.Join(dir, "s.sock")
	text := fmt.Sprintf("[paths]\nstate = %q\nruntime = %q\nsnapshotter_socket = %q\nbundle_socket = %q\ncontainerd_socket = %q\n",
		root, filepath.Join(dir, "run"), socket, filepath.Join(dir, "b.sock"), filepath.Join(dir, "none.sock"))
	if err := os.WriteFile(settings, []byte(text), 0o600); err != nil {
		return nil, nil, err
	}
	daemon := exec.Command(program, "--config", settings)
	daemon.Stdout, daemon.Stderr = os.Stderr, os.Stderr
	if err := daemon.Start(); err != nil {
		return nil, nil, err
	}
	stop := func() error {
		defer os.RemoveAll(dir)
		return end(daemon)
	}
	if err := reachable(socket); err != nil {
		return nil, nil, errors.Join(err, stop())
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, errors.Join(err, stop())
	}
	client := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "ovms")
	return client, func() error { return errors.Join(conn.Close(), stop()) }, nil
}

func reachable(socket string) error {
	deadline := time.Now().Add(patience)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return conn.Close()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the snapshotter does not answer: %w", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// end asks the daemon to stop and fails if it does not do so by itself and with success.
func end(daemon *exec.Cmd) error {
	if err := daemon.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	kill := time.AfterFunc(patience, func() { _ = daemon.Process.Kill() })
	defer kill.Stop()
	return daemon.Wait()
}
