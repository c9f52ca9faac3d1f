//! The daemon as a process, images as the walking differ leaves them, and the questions that a shim asks.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use ovms_artifact::digest::Digest;
use ovms_proto::bundle::{read_line, write_line, FromSnapshotter, ToSnapshotter};
use ovms_snapshotter::proto::snapshots::snapshots_client::SnapshotsClient;
use ovms_snapshotter::proto::snapshots::{CommitSnapshotRequest, PrepareSnapshotRequest};
use rustix::process::{kill_process, Pid, Signal};
use tonic::transport::{Channel, Endpoint};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon below a directory of its own.
pub struct Daemon {
    pub dir: PathBuf,
    pub child: Child,
}

impl Daemon {
    pub fn start(dir: &Path) -> Self {
        Self::start_with(dir, "")
    }

    /// With these settings beside a runtime directory of its own.
    pub fn start_with(dir: &Path, text: &str) -> Self {
        Self::start_under(&[], dir, text)
    }

    /// Started by the program that the first words are.
    pub fn start_under(words: &[&str], dir: &Path, text: &str) -> Self {
        // What a killed daemon left may still take connections for a moment, and must not be taken for the new one.
        for socket in ["s.sock", "b.sock"] {
            let _none_yet = fs::remove_file(dir.join(socket));
        }
        let words: Vec<_> = words.iter().copied().chain([env!("CARGO_BIN_EXE_ovms-snapshotter")]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        command.arg("--root").arg(dir.join("root")).arg("--address").arg(dir.join("s.sock"));
        command.arg("--bundle-address").arg(dir.join("b.sock")).arg("--containerd-address").arg(dir.join("none.sock"));
        let child = command.env("OVMS_CONFIG", settings(dir, text)).spawn().unwrap();
        let daemon = Self { dir: dir.to_owned(), child };
        wait_for("the bundle socket", || UnixStream::connect(dir.join("b.sock")).is_ok());
        daemon
    }

    pub async fn client(&self) -> SnapshotsClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", self.dir.join("s.sock").display())).unwrap();
        SnapshotsClient::new(endpoint.connect().await.unwrap())
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks the bundle service and returns the steps it told of and its last word.
    pub fn resolve(&self, source: &str) -> (Vec<String>, FromSnapshotter) {
        self.resolve_from(source, None)
    }

    /// The same with a checkpoint.
    pub fn resolve_from(&self, source: &str, checkpoint: Option<&Path>) -> (Vec<String>, FromSnapshotter) {
        ask(&self.dir, source, checkpoint)
    }
}

/// Asks the daemon below a directory.
pub fn ask(dir: &Path, source: &str, checkpoint: Option<&Path>) -> (Vec<String>, FromSnapshotter) {
    let mut stream = UnixStream::connect(dir.join("b.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = ToSnapshotter::Resolve {
        namespace: "default".into(),
        container: "vm".into(),
        source: source.into(),
        checkpoint: checkpoint.map(Path::to_owned),
    };
    write_line(&mut stream, &request).unwrap();
    let mut answers = BufReader::new(stream);
    let mut steps = Vec::new();
    loop {
        match read_line(&mut answers).unwrap().expect("an answer") {
            FromSnapshotter::Progress(step) => steps.push(step),
            last => return (steps, last),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}

/// A settings file.
pub fn settings(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("ovms.toml");
    let runtime = dir.join("run");
    fs::write(&path, format!("paths.runtime = {runtime:?}\n{text}\n")).unwrap();
    path
}

/// Waits until something is so.
pub fn wait_for(what: &str, ready: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !ready() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Makes an active snapshot and returns the source of its mount.
pub async fn prepare(client: &mut SnapshotsClient<Channel>, key: &str, parent: &str) -> String {
    let request = PrepareSnapshotRequest { key: key.into(), parent: parent.into(), ..Default::default() };
    let mounts = client.prepare(request).await.unwrap().into_inner().mounts;
    mounts[0].source.clone()
}

/// Commits a snapshot.
pub async fn commit(client: &mut SnapshotsClient<Channel>, name: &str, key: &str) {
    let request = CommitSnapshotRequest { name: name.into(), key: key.into(), ..Default::default() };
    client.commit(request).await.unwrap();
}

/// A raw disk that begins with `text`.
pub fn disk(text: &str) -> Vec<u8> {
    let mut disk = text.as_bytes().to_vec();
    disk.resize(1 << 20, 0);
    disk
}

/// A disk that begins with the last of `texts`, and a descriptor of a machine whose disks begin with all of them: named by
/// their own files, since there is no tar here.
pub fn write_layer(fs: &str, texts: &[&str]) {
    let refs: Vec<_> = texts.iter().map(|text| Digest::of(&disk(text))).collect();
    write_layer_with(fs, texts[texts.len() - 1], &refs, "");
}

/// A disk that begins with `text`, and a descriptor with these disks and more in it.
pub fn write_layer_with(fs: &str, text: &str, refs: &[Digest], more: &str) {
    let ovm = Path::new(fs).join("ovm");
    fs::create_dir(&ovm).unwrap();
    fs::write(ovm.join("disk.raw"), disk(text)).unwrap();
    let layers: Vec<_> = refs.iter().map(|digest| format!(r#"{{"ref":"{digest}","format":"raw"}}"#)).collect();
    let layers = layers.join(",");
    let manifest = format!(
        r#"{{"schemaVersion":1,"mediaType":"application/vnd.ovms.manifest.v1+json","name":"test","version":"1","diskLayers":[{layers}]{more}}}"#
    );
    fs::write(ovm.join("manifest.json"), manifest).unwrap();
}

/// An image of two layers as the walking differ leaves it.
pub async fn walked_image(client: &mut SnapshotsClient<Channel>) {
    walked_image_with(client, "").await;
}

/// The same with more in its topmost descriptor.
pub async fn walked_image_with(client: &mut SnapshotsClient<Channel>, more: &str) {
    let fs = prepare(client, "default/1/extract-a", "").await;
    write_layer(&fs, &["base"]);
    commit(client, "default/2/base", "default/1/extract-a").await;
    let fs = prepare(client, "default/3/extract-b", "default/2/base").await;
    write_layer_with(&fs, "diff", &["base", "diff"].map(|text| Digest::of(&disk(text))), more);
    commit(client, "default/4/diff", "default/3/extract-b").await;
}

/// The bundle record of a machine that may start.
pub fn record(last: FromSnapshotter) -> ovms_bundle::Record {
    match last {
        FromSnapshotter::Resolved { bundle, args: None } => ovms_bundle::Record::load(&bundle).unwrap(),
        other => panic!("not resolved: {other:?}"),
    }
}

/// The names in a directory; none if it is not there.
pub fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// A process that stands still: what it was in the middle of, it stays in the middle of. It goes on when this is dropped.
pub struct Stopped(Pid);

impl Stopped {
    /// Stops all threads of a process; none if it has ended meanwhile.
    fn new(process: u32) -> Option<Self> {
        let pid = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
        kill_process(pid, Signal::STOP).ok()?;
        let stopped = Self(pid);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let tasks = format!("/proc/{process}/task");
            let states: String = names(Path::new(&tasks)).iter().filter_map(|thread| state(&tasks, thread)).collect();
            if states.is_empty() || states.contains(['Z', 'X']) {
                return None;
            }
            if states.chars().all(|state| state == 'T') {
                return Some(stopped);
            }
            assert!(Instant::now() < deadline, "process {process} does not stop: {states}");
            std::thread::yield_now();
        }
    }

    /// Stops a process if something is still so when it stands.
    pub fn while_at(process: u32, at_work: impl Fn() -> bool) -> Option<Self> {
        if !at_work() {
            return None;
        }
        Self::new(process).filter(|_| at_work())
    }

    /// Stops a daemon's worker, if it has one. Its work is undone then, whatever it has said: the daemon takes no
    /// result before its worker has ended well.
    pub fn worker(daemon: u32) -> Option<Self> {
        worker_of(daemon).and_then(Self::new)
    }

    /// Ends the process where it stands.
    pub fn kill(self) {
        kill_process(self.0, Signal::KILL).unwrap();
        std::mem::forget(self);
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _gone_already = kill_process(self.0, Signal::CONT);
    }
}

/// The letter by which the kernel says what a thread does.
fn state(tasks: &str, thread: &str) -> Option<char> {
    let stat = fs::read_to_string(format!("{tasks}/{thread}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// A worker of a daemon, which it starts from whichever of its threads. One that has not become a worker yet still shares the
/// daemon's files, its locks among them.
fn worker_of(daemon: u32) -> Option<u32> {
    let tasks = format!("/proc/{daemon}/task");
    let of_thread = |thread: String| fs::read_to_string(format!("{tasks}/{thread}/children")).unwrap_or_default();
    let all = names(Path::new(&tasks)).into_iter().map(of_thread).collect::<Vec<_>>().join(" ");
    let is_worker = |pid: &u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).nth(1) == Some(ovms_bundle::worker::ARG.as_bytes())
    };
    all.split_whitespace().filter_map(|pid| pid.parse().ok()).find(is_worker)
}
