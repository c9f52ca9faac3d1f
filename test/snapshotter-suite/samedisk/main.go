// samedisk starts a second container on the snapshot of an existing one, which no command-line client does:
//
//	samedisk SOCKET NAMESPACE CONTAINER NEW
//
// It exits with 1 and the error if the second task cannot be created, which is what the test wants to see.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
)

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage: samedisk SOCKET NAMESPACE CONTAINER NEW")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4]); err != nil {
		fmt.Fprintln(os.Stderr, "samedisk:", err)
		os.Exit(1)
	}
}

func run(socket, namespace, container, second string) error {
	ctx := namespaces.WithNamespace(context.Background(), namespace)
	containerd, err := client.New(socket)
	if err != nil {
		return err
	}
	defer containerd.Close()
	first, err := containerd.LoadContainer(ctx, container)
	if err != nil {
		return err
	}
	info, err := first.Info(ctx)
	if err != nil {
		return err
	}
	image, err := first.Image(ctx)
	if err != nil {
		return err
	}
	other, err := containerd.NewContainer(ctx, second,
		client.WithImage(image),
		client.WithSnapshotter(info.Snapshotter),
		client.WithSnapshot(info.SnapshotKey),
		client.WithRuntime(info.Runtime.Name, nil),
		client.WithNewSpec(oci.WithDefaultSpec(), oci.WithDefaultUnixDevices, oci.WithImageConfig(image)))
	if err != nil {
		return err
	}
	// Without its snapshot: that belongs to the first one.
	defer other.Delete(ctx)
	task, err := other.NewTask(ctx, cio.NullIO)
	if err != nil {
		return err
	}
	_, err = task.Delete(ctx, client.WithProcessKill)
	return err
}
