//! Files for an image, the real `ovm` to build it with, and other programs where they are installed.
#![allow(dead_code, reason = "each test binary uses its part of this module")]

use std::ffi::OsStr;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What a program said.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// The checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A host of its own, to run machines on: state, runtime directory, settings, no containerd.
pub struct Host {
    pub dir: tempfile::TempDir,
}

impl Host {
    /// One that ends a machine by force after `stop_timeout` seconds.
    pub fn new(stop_timeout: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let vmm = Path::new(env!("CARGO_BIN_EXE_ovm")).with_file_name("ovms-vmm");
        let vmm = if vmm.exists() { vmm } else { root().join("target/release/ovms-vmm") };
        assert!(vmm.exists(), "ovms-vmm: run `make build`");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let settings = format!(
            "[paths]\nstate = {:?}\nruntime = {:?}\nvmm = {:?}\ncontainerd_socket = {:?}\n[vm]\nstop_timeout_seconds = {stop_timeout}\n",
            at("state"),
            at("runtime"),
            vmm.display().to_string(),
            at("no-containerd.sock"),
        );
        fs::write(dir.path().join("ovms.toml"), settings).unwrap();
        Self { dir }
    }

    /// `ovm` with this host's settings.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovm"));
        command.env("OVMS_CONFIG", self.dir.path().join("ovms.toml")).stdin(Stdio::null());
        command
    }

    /// A layout that boots the bare-metal guest `name`, made once.
    pub fn layout(&self, name: &str) -> PathBuf {
        let kernel = root().join(format!("target/guests/{name}.elf"));
        assert!(kernel.exists(), "{}: run `make guests`", kernel.display());
        let layout = self.dir.path().join(name);
        if layout.exists() {
            return layout;
        }
        let mut build = self.command();
        build.args(["build", "-q", "--name", "t/guest", "--version", "1", "--memory", "64M", "--kernel"]);
        let built = build.arg(kernel).arg("-o").arg(&layout).output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        layout
    }
}

/// A folder with kernel, initrd and two disks.
pub struct Parts {
    dir: tempfile::TempDir,
}

impl Parts {
    pub fn new() -> Self {
        let parts = Self { dir: tempfile::tempdir().unwrap() };
        let state = parts.path("state");
        parts.write("ovms.toml", format!("[paths]\nstate = {:?}\n", state.display().to_string()).as_bytes());
        let mut kernel = vec![0; 4096];
        kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        parts.write("vmlinuz", &kernel);
        parts.write("initrd.img", b"070701 not a real archive, and nobody unpacks it here");
        for (name, fill) in [("base.qcow2", 1), ("diff.qcow2", 2)] {
            let mut disk = vec![fill; 8192];
            disk[..512].fill(0);
            disk[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
            // Clusters of 64 KiB, refcounts of 16 bits, a header of 104 bytes, a disk of no size: the least there is.
            (disk[23], disk[99], disk[103]) = (16, 4, 104);
            parts.write(name, &disk);
        }
        parts
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Runs `ovm` in the folder, without a date from the environment.
    pub fn ovm<S: AsRef<OsStr>>(&self, args: &[S]) -> Said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovm"));
        command.args(args).current_dir(self.dir.path()).env_remove("SOURCE_DATE_EPOCH");
        command.env("OVMS_CONFIG", self.path("ovms.toml"));
        command.output().unwrap().into()
    }

    /// Runs `ovm`, which must succeed, and returns what it printed.
    pub fn ovm_ok(&self, args: &[&str]) -> String {
        let said = self.ovm(args);
        assert_eq!(said.code, Some(0), "ovm {args:?}: {}", said.err);
        said.out
    }

    /// Builds the image of all four files into `out`.
    pub fn build(&self, out: &str, more: &[&str]) -> String {
        let mut args = vec!["build", "--name", "demo/debian", "--version", "13", "--kernel", "vmlinuz"];
        args.extend(["--initrd", "initrd.img", "--args", "console=ttyS0", "--disk", "base.qcow2"]);
        args.extend(["--disk", "diff.qcow2", "--memory", "1G", "--vcpus", "2", "-o", out]);
        args.extend(more);
        self.ovm_ok(&args).trim().to_owned()
    }

    /// `ovm inspect --json`.
    pub fn inspect(&self, path: &str) -> serde_json::Value {
        serde_json::from_str(&self.ovm_ok(&["inspect", "--json", path])).unwrap()
    }

    /// Runs another program in the folder; it must succeed.
    pub fn run(&self, program: &Path, args: &[&str]) -> Said {
        let said: Said = Command::new(program).args(args).current_dir(self.dir.path()).output().unwrap().into();
        assert_eq!(said.code, Some(0), "{} {args:?}: {}{}", program.display(), said.out, said.err);
        said
    }
}

/// Finds a program on the path or among the tools of the test bed.
pub fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .unwrap_or_default();
    let built = fs::read_dir(cache.join("ovms-testbed")).into_iter().flatten().flatten().map(|e| e.path());
    let mut places = std::env::split_paths(&path).chain(built).map(|dir| dir.join(name));
    places
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} is missing: `make deps` and `make test` install it"))
}

/// A registry on 127.0.0.1 that lives as long as this value.
pub struct Registry {
    process: Child,
    pub address: String,
    storage: tempfile::TempDir,
}

impl Registry {
    /// Starts Debian's docker-registry.
    pub fn start() -> Self {
        let program = program("docker-registry");
        let storage = tempfile::tempdir().unwrap();
        // The port is free when it is chosen; that somebody takes it first is seen as a registry that never answers.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let config = storage.path().join("config.yml");
        let root = storage.path().join("data");
        let text = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
            root.display()
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new(program);
        command.arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
        let registry = Self { process: command.spawn().unwrap(), address, storage };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(&registry.address).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not answer on {}", registry.address);
            std::thread::sleep(Duration::from_millis(50));
        }
        registry
    }

    /// Where it keeps what was pushed.
    pub fn data(&self) -> PathBuf {
        self.storage.path().join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
