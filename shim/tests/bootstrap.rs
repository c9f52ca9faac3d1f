//! The program as containerd runs it: `start` and what it prints and leaves, the server behind the address, `delete`
//! and `-info`. Needs neither root nor a containerd: the socket's directory comes with the parameters.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteResponse, Empty, ShutdownRequest,
};
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use containerd_shim_protos::types::mount::Mount;
use ovms_engine::{ProcessId, Record, State};
use tempfile::TempDir;
use ttrpc::asynchronous::{transport::Socket, Client};

const PROGRAM: &str = env!("CARGO_BIN_EXE_containerd-shim-ovms-v1");
const NAMES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// A bundle and the settings of a host.
struct Bed {
    dir: TempDir,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = format!("[paths]\nruntime = \"{0}/run\"\nstate = \"{0}/state\"\n", dir.path().display());
        fs::write(dir.path().join("ovms.toml"), settings).unwrap();
        fs::create_dir(dir.path().join("bundle")).unwrap();
        Self { dir }
    }

    fn bundle(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    fn run(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = Command::new(PROGRAM)
            .args(["-namespace", "default", "-address", "/run/c.sock", "-publish-binary", "/bin/false", "-id", "vm1"])
            .args(args)
            .current_dir(self.bundle())
            .env("OVMS_CONFIG", self.dir.path().join("ovms.toml"))
            .env_remove("TTRPC_ADDRESS")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        // Waits for the end of both pipes: a server that holds one would hang this as it would hang containerd.
        child.wait_with_output().unwrap()
    }

    /// Runs it in `dir`, which is removed under it before it begins if `remove` says so.
    fn run_in(&self, dir: &Path, remove: bool, args: &[&str]) -> Output {
        let remove = if remove { "rmdir \"$PWD\" && " } else { "" };
        Command::new("/bin/sh")
            .args(["-c", &format!("{remove}exec \"$0\" \"$@\""), PROGRAM])
            .args(["-namespace", "default", "-address", "/run/c.sock", "-publish-binary", "/bin/false", "-id", "vm1"])
            .args(args)
            .current_dir(dir)
            .env("OVMS_CONFIG", self.dir.path().join("ovms.toml"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn start(&self) -> PathBuf {
        let params = BootstrapParams {
            instance_id: "vm1".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: self.dir.path().join("nobody.ttrpc").display().to_string(),
            socket_dir: Some(self.dir.path().display().to_string()),
            ..Default::default()
        };
        let output = self.run(&["start"], &params.write_to_bytes().unwrap());
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        let address = String::from_utf8(output.stdout).unwrap();
        assert_eq!(fs::read_to_string(self.bundle().join("address")).unwrap(), address);
        address.strip_prefix("unix://").unwrap().into()
    }
}

async fn call<Q: Message, A: Message>(socket: &Path, service: &str, method: &str, request: &Q) -> A {
    try_call(socket, service, method, request).await.unwrap()
}

async fn try_call<Q: Message, A: Message>(
    socket: &Path,
    service: &str,
    method: &str,
    request: &Q,
) -> Result<A, ttrpc::Error> {
    let client = Client::new(Socket::connect_unix(socket.to_str().unwrap()).await.unwrap());
    let request = ttrpc::Request {
        service: service.into(),
        method: method.into(),
        timeout_nano: Duration::from_secs(5).as_nanos() as i64,
        payload: request.write_to_bytes().unwrap(),
        ..Default::default()
    };
    Ok(A::parse_from_bytes(&client.request(request).await?.payload).unwrap())
}

#[tokio::test]
async fn start_prints_an_address_where_both_task_services_answer_until_shutdown() {
    let bed = Bed::new();
    let socket = bed.start();
    let metadata = fs::metadata(&socket).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);

    let mut server = 0;
    for name in NAMES {
        let request = ConnectRequest { id: "vm1".into(), ..Default::default() };
        let answer: ConnectResponse = call(&socket, name, "Connect", &request).await;
        assert_eq!(answer.task_pid, 0);
        server = answer.shim_pid;
    }
    let again = bed.start();
    assert_eq!(again, socket, "a second start finds the server that runs");

    let _: Empty = call(&socket, NAMES[0], "Shutdown", &ShutdownRequest::new()).await;
    let end = Instant::now() + Duration::from_secs(5);
    let is_gone = || !fs::read_to_string(format!("/proc/{server}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    while !is_gone() || socket.exists() {
        assert!(Instant::now() < end, "the server does not end");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn create_without_a_snapshotter_names_its_socket_and_the_way_out() {
    let bed = Bed::new();
    let bundle_socket = bed.dir.path().join("b.sock");
    let mut settings = fs::OpenOptions::new().append(true).open(bed.dir.path().join("ovms.toml")).unwrap();
    writeln!(settings, "bundle_socket = {bundle_socket:?}").unwrap();
    fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/specs/ctr-2.4.json"), bed.bundle().join("config.json"))
        .unwrap();
    let socket = bed.start();
    let root = Mount { type_: "bind".into(), source: "/s/7/fs".into(), ..Default::default() };
    let bundle = bed.bundle().display().to_string();
    let request = CreateTaskRequest { id: "vm1".into(), bundle, rootfs: vec![root], ..Default::default() };
    let create = || try_call::<_, CreateTaskResponse>(&socket, NAMES[1], "Create", &request);

    let nobody = create().await;
    // A daemon that was killed leaves its socket behind.
    drop(std::os::unix::net::UnixListener::bind(&bundle_socket).unwrap());
    let left_behind = create().await;
    let _: Empty = call(&socket, NAMES[0], "Shutdown", &ShutdownRequest::new()).await;

    for (answer, why) in [(nobody, "No such file"), (left_behind, "Connection refused")] {
        let Err(ttrpc::Error::RpcStatus(status)) = answer else { panic!("not refused: {answer:?}") };
        assert_eq!(status.code(), ttrpc::Code::UNAVAILABLE);
        for expected in [&bundle_socket.display().to_string(), "systemctl start ovms-bundle.socket", why] {
            assert_eq!(status.message().matches(expected).count(), 1, "{expected}: {}", status.message());
        }
    }
    assert!(!bed.dir.path().join("run/machines").exists());
}

#[test]
fn start_without_an_event_address_fails_and_leaves_no_socket() {
    let bed = Bed::new();
    let output = bed.run(&["start"], b"");
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("TTRPC_ADDRESS"), "{output:?}");
    assert!(!bed.bundle().join("address").exists());
}

#[test]
fn start_with_broken_settings_says_which_key() {
    let bed = Bed::new();
    fs::write(bed.dir.path().join("ovms.toml"), "[vm]\nmemroy = \"1G\"\n").unwrap();
    let output = bed.run(&["start"], b"");
    assert!(!output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("memroy"), "{output:?}");
}

/// The record of a machine on disk whose VMM is played by a `sleep`.
struct Machine {
    vmm: std::process::Child,
    dir: PathBuf,
}

impl Machine {
    fn new(bed: &Bed, instance: Option<String>) -> Self {
        let vmm = Command::new("sleep").arg("600").spawn().unwrap();
        let stat = fs::read_to_string(format!("/proc/{}/stat", vmm.id())).unwrap();
        let start_time = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(19).unwrap().parse().unwrap();
        let record = Record {
            id: "vm1".into(),
            namespace: "default".into(),
            state: State::Running,
            created: SystemTime::now(),
            process: Some(ProcessId { pid: vmm.id(), start_time }),
            cgroup: vec![],
            uid: None,
            tops: vec![],
            vcpus: 1,
            memory: 64 << 20,
            timeline: vec![],
            exit: None,
            instance,
        };
        let dir = bed.dir.path().join("run/machines/default/vm1");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("lock"), "").unwrap();
        fs::write(dir.join("record.json"), serde_json::to_vec(&record).unwrap()).unwrap();
        Self { vmm, dir }
    }

    fn lives(&mut self) -> bool {
        self.vmm.try_wait().unwrap().is_none()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

/// A container whose server has ended; what `start` has noted of it.
async fn left(bed: &Bed) -> Option<String> {
    let socket = bed.start();
    let _: Empty = call(&socket, NAMES[0], "Shutdown", &ShutdownRequest::new()).await;
    let note: serde_json::Value =
        serde_json::from_slice(&fs::read(bed.bundle().join("ovms-machine.json")).unwrap()).unwrap();
    Some(note["instance"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn delete_with_broken_settings_cleans_up_from_what_start_has_noted_and_says_so() {
    let bed = Bed::new();
    let mut machine = Machine::new(&bed, left(&bed).await);
    fs::write(bed.dir.path().join("ovms.toml"), "[paths\nruntime =").unwrap();
    let bundle = bed.bundle().display().to_string();
    let output = bed.run(&["-bundle", &bundle, "delete"], b"");
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("ovms.toml cannot be used") && said.contains("as noted at its start"), "{said}");
    let answer = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!((answer.pid, answer.exit_status), (machine.vmm.id(), 137));
    assert!(!machine.lives() && !machine.dir.exists());
}

#[tokio::test]
async fn delete_for_an_earlier_container_of_the_id_leaves_the_next_one_alone() {
    let bed = Bed::new();
    let earlier = left(&bed).await;
    let bundle = bed.bundle();
    // The next one has the same path, and hooks that are due.
    let old = bed.dir.path().join(".vm1");
    fs::rename(&bundle, &old).unwrap();
    fs::create_dir(&bundle).unwrap();
    let next = left(&bed).await;
    assert_ne!(earlier, next);
    let mut machine = Machine::new(&bed, next);
    let ran = bed.dir.path().join("ran");
    let hook = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", format!("echo >{}", ran.display())]});
    let spec = serde_json::json!({"ociVersion": "1.2.0", "hooks": {"poststop": [hook]}});
    fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    fs::write(bundle.join("ovms-poststop-due"), "").unwrap();
    let socket = bed.dir.path().join("socket");
    fs::write(&socket, "").unwrap();
    fs::write(bundle.join("address"), format!("unix://{}", socket.display())).unwrap();

    let args = ["-bundle", bundle.to_str().unwrap(), "delete"];
    // While the earlier bundle is being removed, and when it is gone.
    let removed = bed.dir.path().join("removed");
    fs::create_dir(&removed).unwrap();
    for (place, remove) in [(&old, false), (&removed, true)] {
        let output = bed.run_in(place, remove, &args);
        assert!(output.status.success(), "{output:?}");
        assert!(machine.lives() && machine.dir.join("record.json").exists());
        assert!(socket.exists() && !ran.exists(), "hooks and socket of the next one");
        assert_eq!(DeleteResponse::parse_from_bytes(&output.stdout).unwrap().pid, 0);
    }
    let output = bed.run(&args, b"");
    assert!(output.status.success(), "{output:?}");
    assert!(!machine.lives() && !machine.dir.exists() && !socket.exists() && ran.exists());
}

#[test]
fn delete_of_nothing_answers_killed_as_often_as_it_is_asked() {
    let bed = Bed::new();
    let bundle = bed.bundle().display().to_string();
    for _ in 0..2 {
        let output = bed.run(&["-bundle", &bundle, "delete"], b"");
        assert!(output.status.success(), "{output:?}");
        let answer = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!((answer.pid, answer.exit_status), (0, 137));
        assert!(answer.exited_at.seconds > 0);
    }
}

#[test]
fn info_describes_the_runtime() {
    let output = Bed::new().run(&["-info"], b"");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(RuntimeInfo::parse_from_bytes(&output.stdout).unwrap().name, "io.containerd.ovms.v1");
}
