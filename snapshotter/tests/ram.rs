//! RAM that machines resume from, by way of checkpoints, which need no content store: unpacked once, on tmpfs, locked, gone
//! with its last user, and whole after kills. The worker is real; the blobs hold memory that no machine ever had.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use ovms_artifact::digest::Digest;
use ovms_bundle::{Bundle, Manifest, SnapshotDisk, SnapshotRam, SnapshotRecord, SNAPSHOT_VERSION};
use ovms_disk::qcow2::Plan;
use ovms_disk::{Stack, StackFiles, Table, Top, TopFiles};
use ovms_proto::bundle::{FromSnapshotter, RefusalKind};
use ovms_snapshotter::proto::snapshots::snapshots_client::SnapshotsClient;
use ovms_snapshotter::proto::snapshots::{CleanupRequest, RemoveSnapshotRequest};
use ovms_state::{Fingerprint, Section, SnapshotWriter, CHUNK};
use tonic::transport::Channel;

use common::{commit, names, prepare, record, wait_for, walked_image, walked_image_with, Daemon, Stopped};

const MIB: u64 = 1 << 20;

/// Writes a RAM blob whose every fourth chunk holds `byte` and noise; returns its digest.
fn write_ram(path: &Path, memory: u64, byte: u8) -> Digest {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    let writer = SnapshotWriter::create(file, memory, None).unwrap();
    let mut noise = u64::from(byte) + 1;
    for chunk in (0..writer.chunks()).step_by(4) {
        let mut data = vec![byte; CHUNK];
        for at in &mut data[CHUNK / 2..] {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *at = (noise >> 56) as u8;
        }
        writer.put(chunk, &data).unwrap();
    }
    let section = Section { kind: "test".into(), version: 1, payload: vec![byte] };
    writer.finish(1, Fingerprint::default(), &[section]).unwrap();
    Digest::of(&fs::read(path).unwrap())
}

/// Writes a disk of 1 MiB that says `text` in its middle and nothing else.
fn write_disk(dir: &Path, text: &str) -> SnapshotDisk {
    let file =
        |name: &str| File::options().read(true).write(true).create(true).truncate(true).open(dir.join(name)).unwrap();
    Table::empty(MIB).unwrap().write_to(&file("table")).unwrap();
    let (data, map) = (file("data"), file("map"));
    Top::create(&data, &map, MIB).unwrap();
    let top = Some(TopFiles { data, map });
    let stack =
        Stack::open(StackFiles { table: file_at(dir, "table"), layers: vec![], frozen: vec![], top }, false).unwrap();
    let mut sector = text.as_bytes().to_vec();
    sector.resize(4096, 0);
    stack.write_at(MIB / 2, &sector).unwrap();
    let mut disk = Vec::new();
    Plan::diff(&stack).unwrap().write_to(&mut disk).unwrap();
    for name in ["table", "data", "map"] {
        fs::remove_file(dir.join(name)).unwrap();
    }
    fs::write(dir.join("disk.qcow2"), &disk).unwrap();
    SnapshotDisk { digest: Digest::of(&disk).to_string(), size: disk.len() as u64, virtual_size: MIB }
}

fn file_at(dir: &Path, name: &str) -> File {
    File::open(dir.join(name)).unwrap()
}

/// A checkpoint of a machine of `walked_image`.
fn checkpoint(dir: &Path, memory: u64, byte: u8) -> (PathBuf, Digest) {
    let dir = dir.join(format!("checkpoint-{byte}"));
    fs::create_dir(&dir).unwrap();
    let digest = write_ram(&dir.join("ram"), memory, byte);
    let size = fs::metadata(dir.join("ram")).unwrap().len();
    let ram = SnapshotRam { digest: digest.to_string(), size, parents: vec![], vcpus: 1, memory, stood_micros: 0 };
    let disk = Some(write_disk(&dir, "checkpointed"));
    let record = SnapshotRecord {
        version: SNAPSHOT_VERSION,
        machine: "default/vm".into(),
        image: None,
        manifest: Manifest::new("test", "1"),
        ram,
        disk,
    };
    record.save(&dir).unwrap();
    (dir, digest)
}

/// The walked image and a container's snapshot on it.
async fn container(client: &mut SnapshotsClient<Channel>, key: &str) -> String {
    prepare(client, key, "default/4/diff").await
}

fn read_sector(bundle: &Path, at: u64) -> Vec<u8> {
    let stack = Bundle::open(bundle, "a test", true).unwrap().disk.unwrap().into_stack().unwrap();
    let mut sector = vec![0; 512];
    stack.read_at(at, &mut sector).unwrap();
    sector
}

fn bundle_of(source: &str) -> PathBuf {
    Path::new(source).parent().unwrap().join("bundle.json")
}

async fn remove(client: &mut SnapshotsClient<Channel>, key: &str) {
    client.remove(RemoveSnapshotRequest { key: key.into(), ..Default::default() }).await.unwrap();
    client.cleanup(CleanupRequest::default()).await.unwrap();
}

/// Waits, since what a snapshot leaves is removed after the answer.
fn nothing_is_left(dir: &Path) {
    let left = || [names(&dir.join("root/ram")), names(&dir.join("root/tmp"))].concat();
    wait_for(&format!("an end of {:?}", left()), || left().is_empty());
}

fn refused(last: FromSnapshotter) -> String {
    match last {
        FromSnapshotter::Refused { message, .. } => message,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn a_checkpoint_becomes_ram_and_the_disk_of_its_instant() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    walked_image(&mut client).await;
    let (from, digest) = checkpoint(dir.path(), 4 * MIB, 7);
    let source = container(&mut client, "default/5/vm").await;

    let (steps, last) = daemon.resolve_from(&source, Some(&from));

    let ram = record(last).ram.expect("RAM");
    assert_eq!((ram.digest, ram.mlock), (digest.to_string(), false));
    assert!(steps.iter().any(|step| step.contains("unpacking RAM snapshot")), "{steps:?}");
    let memory = fs::read(&ram.memory).unwrap();
    assert_eq!(memory.len() as u64, 4 * MIB);
    assert!(memory[..CHUNK / 2].iter().all(|b| *b == 7) && memory[CHUNK..4 * CHUNK].iter().all(|b| *b == 0));
    assert!(fs::metadata(&ram.memory).unwrap().blocks() * 512 < 2 * MIB);
    let bundle = bundle_of(&source);
    assert!(read_sector(&bundle, MIB / 2).starts_with(b"checkpointed") && read_sector(&bundle, 0).starts_with(b"diff"));
    // The one who gave it removes it, and a Create that is tried again finds all as it was.
    assert_eq!(record(daemon.resolve_from(&source, Some(&from)).1).ram.unwrap().digest, digest.to_string());
    fs::remove_dir_all(&from).unwrap();
    assert!(ram.state.exists());
    remove(&mut client, "default/5/vm").await;
    assert!(!ram.memory.exists() && names(&dir.path().join("root/ram")).is_empty());
}

#[tokio::test]
async fn a_machine_whose_disk_was_written_boots() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    walked_image(&mut client).await;
    let (from, digest) = checkpoint(dir.path(), MIB, 7);
    let source = container(&mut client, "default/5/vm").await;
    assert!(record(daemon.resolve_from(&source, Some(&from)).1).ram.is_some());
    let bundle = bundle_of(&source);
    let disk = Bundle::open(&bundle, "a machine", false).unwrap().disk.unwrap();
    // While a machine runs, its record is left alone.
    assert!(record(daemon.resolve(&source).1).ram.is_some());
    let stack = disk.into_stack().unwrap();
    stack.write_at(8192, &[9; 512]).unwrap();
    stack.flush().unwrap();
    drop(stack);

    let again = daemon.resolve_from(&source, Some(&from)).1;
    let alone = record(daemon.resolve(&source).1);

    assert!(refused(again).contains("restore it into a new container"));
    assert_eq!(alone.ram, None);
    assert!(read_sector(&bundle, MIB / 2).starts_with(b"checkpointed") && read_sector(&bundle, 8192).starts_with(&[9]));
    client.cleanup(CleanupRequest::default()).await.unwrap();
    assert!(!dir.path().join("root/ram").join(digest.hex()).exists());
}

#[tokio::test]
async fn a_checkpoint_takes_the_place_of_a_difference_that_was_applied() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    walked_image(&mut client).await;
    let (from, _) = checkpoint(dir.path(), MIB, 7);
    let source = container(&mut client, "default/5/vm").await;
    let record = record(daemon.resolve_from(&source, Some(&from)).1);
    let disk = record.disk.unwrap();
    assert_eq!((disk.layers.len(), disk.frozen.len()), (2, 1));

    // A commit makes one layer of the checkpoint's disk and what was written since.
    let stack = Bundle::open(&bundle_of(&source), "a machine", false).unwrap().disk.unwrap().into_stack().unwrap();
    stack.write_at(8192, &[9; 512]).unwrap();
    stack.flush().unwrap();
    drop(stack);
    commit(&mut client, "default/6/committed", "default/5/vm").await;
    let source = prepare(&mut client, "default/7/vm2", "default/6/committed").await;
    let second = common::record(daemon.resolve(&source).1);

    let disk = second.disk.unwrap();
    assert_eq!((disk.layers.len(), disk.frozen.len(), second.ram), (3, 0, None));
    let bundle = bundle_of(&source);
    assert!(read_sector(&bundle, MIB / 2).starts_with(b"checkpointed") && read_sector(&bundle, 8192).starts_with(&[9]));
    assert!(read_sector(&bundle, 0).starts_with(b"diff"));
}

#[tokio::test]
async fn checkpoints_that_do_not_hold_are_refused_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    walked_image(&mut client).await;
    let (from, _) = checkpoint(dir.path(), MIB, 7);
    let whole = SnapshotRecord::load(&from).unwrap();
    let flip = |name: &'static str, at: u64| {
        move |dir: &Path| {
            let file = File::options().read(true).write(true).open(dir.join(name)).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        }
    };
    let saved = |change: fn(&mut SnapshotRecord)| {
        let mut record = whole.clone();
        change(&mut record);
        move |dir: &Path| drop(record.save(dir).unwrap())
    };
    type Damage = Box<dyn Fn(&Path)>;
    let cases: Vec<(Damage, &str)> = vec![
        (Box::new(flip("ram", 100)), "digest"),
        (Box::new(flip("disk.qcow2", 4)), "disk is refused"),
        (Box::new(|dir| fs::remove_file(dir.join("snapshot.json")).unwrap()), "snapshot.json"),
        (Box::new(|dir| fs::remove_file(dir.join("ram")).unwrap()), "the checkpoint lacks"),
        (Box::new(|dir| fs::remove_file(dir.join("disk.qcow2")).unwrap()), "disk.qcow2"),
        (Box::new(saved(|record| record.disk = None)), "has no disk, the image has one"),
        (Box::new(saved(|record| record.disk.as_mut().unwrap().virtual_size = 512)), "its record says 512"),
        (Box::new(saved(|record| record.ram.digest = "../../etc".into())), "digest"),
    ];
    for (number, (damage, expected)) in cases.into_iter().enumerate() {
        let bad = dir.path().join(format!("bad-{number}"));
        fs::create_dir(&bad).unwrap();
        for name in ["ram", "disk.qcow2", "snapshot.json"] {
            fs::copy(from.join(name), bad.join(name)).unwrap();
        }
        damage(&bad);
        let key = format!("default/{}/vm", 10 + number);
        let source = container(&mut client, &key).await;

        let message = refused(daemon.resolve_from(&source, Some(&bad)).1);

        assert!(message.contains(expected), "{number}: {message}");
        remove(&mut client, &key).await;
        nothing_is_left(dir.path());
    }
}

#[tokio::test]
async fn a_host_that_denies_ram_refuses_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_with(dir.path(), "ram.policy = \"deny\"");
    let mut client = daemon.client().await;
    walked_image(&mut client).await;
    let (from, _) = checkpoint(dir.path(), MIB, 7);
    let source = container(&mut client, "default/5/vm").await;

    let message = refused(daemon.resolve_from(&source, Some(&from)).1);

    assert!(message.contains("ram.policy"), "{message}");
}

/// What a descriptor says of RAM, which the blobs of checkpoints here are treated by.
fn hints(hints: &str) -> String {
    format!(r#","ramSnapshot":{{"ref":"{}",{hints}}}"#, Digest::of(b"the image's own"))
}

#[tokio::test]
async fn preloaded_ram_lies_on_tmpfs_within_its_budget() {
    let (dir, shm) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    std::os::unix::fs::symlink(shm.path(), dir.path().join("run")).unwrap();
    let daemon = Daemon::start_with(dir.path(), "ram.preload_budget = \"1M\"");
    let mut client = daemon.client().await;
    walked_image_with(&mut client, &hints(r#""preload_hint":true"#)).await;
    let (small, _) = checkpoint(dir.path(), 2 * MIB, 7);
    let (large, _) = checkpoint(dir.path(), 16 * MIB, 8);
    let (one, two) = (container(&mut client, "default/5/one").await, container(&mut client, "default/6/two").await);

    let fits = record(daemon.resolve_from(&one, Some(&small)).1).ram.unwrap();
    let (steps, last) = daemon.resolve_from(&two, Some(&large));

    assert!(fits.memory.canonicalize().unwrap().starts_with(shm.path()), "{}", fits.memory.display());
    assert_eq!(fs::read(&fits.memory).unwrap().len() as u64, 2 * MIB);
    let on_disk = record(last).ram.unwrap();
    assert!(on_disk.memory.starts_with(dir.path().join("root")));
    assert!(steps.iter().any(|step| step.contains("preload_budget")), "{steps:?}");
    // After a reboot tmpfs is empty.
    fs::remove_file(&fits.memory).unwrap();
    assert_eq!(record(daemon.resolve_from(&one, Some(&small)).1).ram.unwrap(), fits);
    assert!(fits.memory.exists());
    remove(&mut client, "default/5/one").await;
    assert!(!fits.memory.exists() && fits.memory.parent().unwrap().exists());
}

fn locked_kib(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmLck:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn ram_that_must_be_locked_is_as_long_as_a_container_uses_it() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    walked_image_with(&mut client, &hints(r#""mlock_required":true"#)).await;
    let (from, _) = checkpoint(dir.path(), 4 * MIB, 7);
    let (one, two) = (container(&mut client, "default/5/one").await, container(&mut client, "default/6/two").await);
    assert_eq!(locked_kib(&daemon), 0);

    let ram = record(daemon.resolve_from(&one, Some(&from)).1).ram.unwrap();
    let once = locked_kib(&daemon);
    record(daemon.resolve_from(&two, Some(&from)).1);

    let data = fs::metadata(&ram.memory).unwrap().blocks() / 2;
    assert!(ram.mlock && once >= data, "{once} KiB are locked, {data} KiB are data");
    assert_eq!(locked_kib(&daemon), once);
    daemon.kill();
    let daemon = Daemon::start(dir.path());
    wait_for("the lock after a start", || locked_kib(&daemon) == once);
    let mut client = daemon.client().await;
    remove(&mut client, "default/5/one").await;
    assert_eq!(locked_kib(&daemon), once);
    remove(&mut client, "default/6/two").await;
    assert_eq!(locked_kib(&daemon), 0);
}

/// KiB of a file that a process has locked, by its own account.
fn locked_kib_of(daemon: &Daemon, path: &Path) -> u64 {
    let inode = fs::metadata(path).unwrap().ino().to_string();
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", daemon.child.id())).unwrap();
    let (mut ours, mut locked) = (false, 0);
    for line in smaps.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            [range, _, _, _, found, ..] if range.contains('-') => ours = *found == inode,
            ["Locked:", kib, "kB"] if ours => locked += kib.parse::<u64>().unwrap(),
            _ => {}
        }
    }
    locked
}

#[tokio::test]
async fn ram_is_locked_in_the_file_that_each_machine_maps() {
    let (dir, shm) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    std::os::unix::fs::symlink(shm.path(), dir.path().join("run")).unwrap();
    let daemon = Daemon::start_with(dir.path(), "ram.preload_budget = 0");
    let mut client = daemon.client().await;
    walked_image_with(&mut client, &hints(r#""preload_hint":true,"mlock_required":true"#)).await;
    let (from, _) = checkpoint(dir.path(), 4 * MIB, 7);
    let (one, two) = (container(&mut client, "default/5/one").await, container(&mut client, "default/6/two").await);
    let on_disk = record(daemon.resolve_from(&one, Some(&from)).1).ram.unwrap().memory;
    let data = locked_kib_of(&daemon, &on_disk);
    assert!(on_disk.starts_with(dir.path().join("root")) && data > 0, "{data} KiB of {}", on_disk.display());
    daemon.kill();
    let daemon = Daemon::start(dir.path());
    wait_for("the lock after a start", || locked_kib_of(&daemon, &on_disk) == data);

    // There is room on tmpfs now, while the first machine still maps the file on disk.
    let on_tmpfs = record(daemon.resolve_from(&two, Some(&from)).1).ram.unwrap().memory;

    assert!(on_tmpfs.canonicalize().unwrap().starts_with(shm.path()), "{}", on_tmpfs.display());
    assert_eq!((locked_kib_of(&daemon, &on_disk), locked_kib_of(&daemon, &on_tmpfs)), (data, data));
    // A start finds both again.
    daemon.kill();
    let daemon = Daemon::start(dir.path());
    let both = || (locked_kib_of(&daemon, &on_disk), locked_kib_of(&daemon, &on_tmpfs));
    wait_for("both locks after a start", || both() == (data, data));
    // A copy in the place of another is another file.
    fs::remove_file(&on_tmpfs).unwrap();
    record(daemon.resolve_from(&two, Some(&from)).1);
    assert_eq!((both(), locked_kib(&daemon)), ((data, data), 3 * data));
    // The first machine is started again, from the copy: nobody maps the file on disk any more.
    assert_eq!(record(daemon.resolve_from(&one, Some(&from)).1).ram.unwrap().memory, on_tmpfs);
    assert_eq!(both(), (0, data));
    let mut client = daemon.client().await;
    remove(&mut client, "default/5/one").await;
    assert_eq!(locked_kib_of(&daemon, &on_tmpfs), data);
    remove(&mut client, "default/6/two").await;
    assert_eq!(locked_kib(&daemon), 0);
}

#[tokio::test]
async fn ram_that_cannot_be_locked_is_refused_with_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let root = rustix::process::geteuid().is_root();
    // CAP_IPC_LOCK takes away every limit.
    let privileged = if root { &["setpriv", "--bounding-set=-ipc_lock"][..] } else { &[] };
    let words = [privileged, &["prlimit", "--memlock=65536:65536"]].concat();
    let daemon = Daemon::start_under(&words, dir.path(), "");
    let mut client = daemon.client().await;
    walked_image_with(&mut client, &hints(r#""mlock_required":true"#)).await;
    let (from, _) = checkpoint(dir.path(), 4 * MIB, 7);
    let source = container(&mut client, "default/5/vm").await;

    let message = refused(daemon.resolve_from(&source, Some(&from)).1);

    for expected in ["mlock_required", "limited to 64 KiB", "LimitMEMLOCK=infinity"] {
        assert!(message.contains(expected), "{message}");
    }
}

/// What was met in the middle of a resolve.
struct Met<T> {
    what: T,
    source: String,
    asked: JoinHandle<Option<FromSnapshotter>>,
}

/// Has containers started from a checkpoint, one after the other and each anew, until `look` finds something at work.
async fn met_at_work<T>(daemon: &Daemon, from: &Path, look: impl Fn() -> Option<T>) -> Met<T> {
    let mut client = daemon.client().await;
    for attempt in 0..50 {
        let key = format!("default/1{attempt}/vm");
        let source = container(&mut client, &key).await;
        let asked = std::thread::spawn({
            let (source, from, dir) = (source.clone(), from.to_owned(), daemon.dir.clone());
            // A daemon that is killed does not answer.
            move || std::panic::catch_unwind(|| common::ask(&dir, &source, Some(&from)).1).ok()
        });
        while !asked.is_finished() {
            if let Some(what) = look() {
                return Met { what, source, asked };
            }
        }
        assert!(record(asked.join().unwrap().unwrap()).ram.is_some());
        remove(&mut client, &key).await;
        nothing_is_left(&daemon.dir);
    }
    panic!("nothing was met at work");
}

/// The place where a digest's RAM is made.
fn being_made(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join("root/ram").join(format!(".{}.new", digest.hex()))
}

/// Starts a daemon, sees that nothing of an attempt is left, and has it make RAM; returns the memory file.
async fn the_next_daemon_makes_it_whole(dir: &Path, source: &str, from: &Path, memory: u64) -> PathBuf {
    let daemon = Daemon::start(dir);
    // Its sockets take connections before it has looked around; an answer comes afterwards.
    daemon.client().await.cleanup(CleanupRequest::default()).await.unwrap();
    let unfinished = names(&dir.join("root/ram")).into_iter().filter(|name| name.starts_with('.'));
    assert_eq!(unfinished.collect::<Vec<_>>(), [""; 0]);
    assert_eq!(names(&dir.join("root/tmp")), [""; 0]);

    let ram = record(daemon.resolve_from(source, Some(from)).1).ram.unwrap();

    let found = fs::read(&ram.memory).unwrap();
    assert_eq!(found.len() as u64, memory);
    for chunk in (0..found.len()).step_by(4 * CHUNK) {
        assert!(found[chunk..chunk + CHUNK / 2].iter().all(|byte| *byte == 7), "at {chunk}");
    }
    ram.memory
}

#[tokio::test]
async fn a_kill_in_the_middle_of_an_unpack_leaves_nothing_and_the_next_one_works() {
    let dir = tempfile::tempdir().unwrap();
    let (from, digest) = checkpoint(dir.path(), 96 * MIB, 7);
    let daemon = Daemon::start(dir.path());
    walked_image(&mut daemon.client().await).await;
    let (process, made) = (daemon.child.id(), being_made(dir.path(), &digest));
    let unpacking = || made.join("memory").exists().then(|| Stopped::worker(process)).flatten();
    let Met { what: worker, source, asked } = met_at_work(&daemon, &from, unpacking).await;

    daemon.kill();

    assert_eq!(asked.join().unwrap(), None);
    assert!(made.join("memory").exists() && !dir.path().join("root/ram").join(digest.hex()).exists());
    the_next_daemon_makes_it_whole(dir.path(), &source, &from, 96 * MIB).await;
    // The orphan, which would find nobody to tell.
    worker.kill();
}

#[tokio::test]
async fn a_kill_while_a_blob_arrives_leaves_nothing_and_the_next_daemon_works() {
    let dir = tempfile::tempdir().unwrap();
    let (from, digest) = checkpoint(dir.path(), 96 * MIB, 7);
    let size = fs::metadata(from.join("ram")).unwrap().len();
    let daemon = Daemon::start(dir.path());
    walked_image(&mut daemon.client().await).await;
    let process = daemon.child.id();
    let tmp = dir.path().canonicalize().unwrap().join("root/tmp");
    // The copy has no name: it is known by where it lies and by how much of it is there.
    let arriving = || {
        let fds = PathBuf::from(format!("/proc/{process}/fd"));
        let half = |fd: &Path| {
            fs::read_link(fd).is_ok_and(|file| file.parent() == Some(&tmp))
                && fs::metadata(fd).is_ok_and(|found| found.is_file() && (1..size).contains(&found.len()))
        };
        names(&fds).iter().any(|fd| half(&fds.join(fd)))
    };
    let Met { what, source, asked } = met_at_work(&daemon, &from, || Stopped::while_at(process, arriving)).await;

    what.kill();

    daemon.kill();
    assert_eq!(asked.join().unwrap(), None);
    assert!(!being_made(dir.path(), &digest).exists());
    the_next_daemon_makes_it_whole(dir.path(), &source, &from, 96 * MIB).await;
}

#[tokio::test]
async fn a_kill_before_a_copy_on_tmpfs_has_its_name_leaves_nothing_and_the_next_daemon_works() {
    let (dir, shm) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    std::os::unix::fs::symlink(shm.path(), dir.path().join("run")).unwrap();
    let (from, digest) = checkpoint(dir.path(), 128 * MIB, 7);
    let daemon = Daemon::start(dir.path());
    walked_image_with(&mut daemon.client().await, &hints(r#""preload_hint":true"#)).await;
    let process = daemon.child.id();
    let copies = || {
        let roots = names(&shm.path().join("ram"));
        roots.iter().flat_map(|root| names(&shm.path().join("ram").join(root))).collect::<Vec<_>>()
    };
    let copying = || copies() == [format!(".new-{}", digest.hex())];
    let Met { what, source, asked } = met_at_work(&daemon, &from, || Stopped::while_at(process, copying)).await;

    what.kill();

    daemon.kill();
    assert_eq!(asked.join().unwrap(), None);
    assert!(copying());
    let memory = the_next_daemon_makes_it_whole(dir.path(), &source, &from, 128 * MIB).await;
    assert!(memory.canonicalize().unwrap().starts_with(shm.path()), "{}", memory.display());
    assert_eq!(copies(), [digest.hex()]);
}

#[tokio::test]
async fn a_ram_worker_that_is_killed_is_told_and_the_next_attempt_works() {
    let dir = tempfile::tempdir().unwrap();
    let (from, digest) = checkpoint(dir.path(), 96 * MIB, 7);
    let daemon = Daemon::start(dir.path());
    walked_image(&mut daemon.client().await).await;
    let made = being_made(dir.path(), &digest);
    let unpacking = || made.join("memory").exists().then(|| Stopped::worker(daemon.child.id())).flatten();
    let Met { what: worker, source, asked } = met_at_work(&daemon, &from, unpacking).await;

    worker.kill();

    let last = asked.join().unwrap().unwrap();
    assert!(matches!(&last, FromSnapshotter::Refused { kind: RefusalKind::Invalid, .. }), "{last:?}");
    let message = refused(last);
    assert!(message.contains("worker failed") && message.contains("killed by signal 9"), "{message}");
    nothing_is_left(dir.path());
    assert!(record(daemon.resolve_from(&source, Some(&from)).1).ram.is_some());
}
