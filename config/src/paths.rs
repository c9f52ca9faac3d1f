//! Every path name that ovms uses when nobody says otherwise.

/// The settings file; the environment variable [`CONFIG_ENV`] names another one.
pub const CONFIG: &str = "/etc/ovms/ovms.toml";
/// Environment variable that names the settings file.
pub const CONFIG_ENV: &str = "OVMS_CONFIG";
/// What must survive a reboot: snapshots, layers, the local store.
pub const STATE_DIR: &str = "/var/lib/ovms";
/// What need not: sockets, records of running machines, uid leases.
pub const RUNTIME_DIR: &str = "/run/ovms";
/// Socket of the snapshots and diff services (gRPC), below [`RUNTIME_DIR`].
pub const SNAPSHOTTER_SOCKET: &str = "/run/ovms/ovms.sock";
/// Socket of the bundle service (one JSON value a line), below [`RUNTIME_DIR`].
pub const BUNDLE_SOCKET: &str = "/run/ovms/bundle.sock";
/// containerd's own socket.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
/// File name of the VMM, looked for beside the running program and then in `PATH`.
pub const VMM_BINARY: &str = "ovms-vmm";
