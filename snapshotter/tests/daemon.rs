//! The daemon as a process: layers that another differ wrote, kills at any moment, socket activation. Neither root nor
//! containerd is needed: the images here boot their disks, so nothing is read from a content store.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ovms_artifact::digest::Digest;
use ovms_proto::bundle::{FromSnapshotter, RefusalKind};
use ovms_snapshotter::proto::snapshots::snapshots_client::SnapshotsClient;
use ovms_snapshotter::proto::snapshots::{
    CleanupRequest, CommitSnapshotRequest, ListSnapshotsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
    UsageRequest,
};
use tonic::transport::Channel;
use tonic::Code;

use common::{
    commit, names, prepare, record, settings, wait_for, walked_image, write_layer, write_layer_with, Daemon, Stopped,
};

fn assert_machine(record: &ovms_bundle::Record) {
    let disk = record.disk.as_ref().unwrap();
    assert_eq!((record.manifest.name.as_str(), disk.virtual_size, disk.layers.len()), ("test", 1 << 20, 2));
    assert!(fs::read(&disk.layers[0]).unwrap().starts_with(b"base"));
    assert!(fs::read(&disk.layers[1]).unwrap().starts_with(b"diff"));
    assert!(disk.top.as_ref().unwrap().data.exists());
}

#[tokio::test]
async fn layers_of_another_differ_become_a_machine() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    walked_image(&mut client).await;
    let source = prepare(&mut client, "default/5/vm", "default/4/diff").await;

    let (_, last) = daemon.resolve(&source);

    assert_machine(&record(last.clone()));
    assert_eq!(daemon.resolve(&source).1, last);
    let left: Vec<_> =
        fs::read_dir(dir.path().join("root/s/1/fs/ovm")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["manifest.json"]);
    let usage = client.usage(UsageRequest { key: "default/2/base".into(), ..Default::default() }).await.unwrap();
    assert!((1..1 << 20).contains(&usage.into_inner().size));
}

#[tokio::test]
async fn a_committed_container_is_a_layer_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    walked_image(&mut client).await;
    let source = prepare(&mut client, "default/5/vm", "default/4/diff").await;
    let FromSnapshotter::Resolved { bundle, .. } = daemon.resolve(&source).1 else { panic!("not resolved") };
    let open = |path: &Path, read_only| ovms_bundle::Bundle::open(path, "a test", read_only).unwrap().disk.unwrap();
    let running = open(&bundle, false);
    let in_use = CommitSnapshotRequest { name: "default/6/x".into(), key: "default/5/vm".into(), ..Default::default() };
    assert_eq!(client.commit(in_use).await.unwrap_err().code(), Code::FailedPrecondition);
    let stack = running.into_stack().unwrap();
    stack.write_at(4096, &[7; 512]).unwrap();
    stack.flush().unwrap();
    drop(stack);

    commit(&mut client, "default/6/committed", "default/5/vm").await;
    let source = prepare(&mut client, "default/7/vm2", "default/6/committed").await;
    let (_, last) = daemon.resolve(&source);

    // The descriptor still lists the two layers of the image: a top that containerd commits brings none of its own.
    let record = record(last);
    assert_eq!(record.disk.as_ref().unwrap().layers.len(), 3);
    let stack = open(&dir.path().join("root/s/4/bundle.json"), false).into_stack().unwrap();
    let mut sector = [0; 512];
    stack.read_at(4096, &mut sector).unwrap();
    assert_eq!(sector, [7; 512]);
    stack.read_at(0, &mut sector).unwrap();
    assert!(sector.starts_with(b"diff"));
    assert!(!dir.path().join("root/s/3/top").exists());
}

#[tokio::test]
async fn a_kill_at_any_moment_of_a_conversion_loses_nothing() {
    for delay in [0, 1, 3, 10, 30] {
        let dir = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(dir.path());
        walked_image(&mut daemon.client().await).await;
        std::thread::sleep(Duration::from_millis(delay));
        daemon.kill();

        let daemon = Daemon::start(dir.path());
        let source = prepare(&mut daemon.client().await, "default/5/vm", "default/4/diff").await;

        assert_machine(&record(daemon.resolve(&source).1));
        assert_eq!(fs::read_dir(dir.path().join("root/tmp")).unwrap().count(), 0, "after {delay} ms");
    }
}

/// Commits a disk, again and again, until its conversion is met at work; returns the worker, which stands still, the
/// snapshot's directory and its name.
async fn met_at_work(daemon: &Daemon) -> (Stopped, PathBuf, String) {
    let mut client = daemon.client().await;
    let content: Vec<u8> = (0..64_u32 << 18).flat_map(|word| (word ^ 0x5bd1_e995).to_le_bytes()).collect();
    for attempt in 0..50 {
        let (key, name) = (format!("default/1{attempt}/extract"), format!("default/2{attempt}/base"));
        let fs = prepare(&mut client, &key, "").await;
        write_layer(&fs, &["base"]);
        fs::write(Path::new(&fs).join("ovm/disk.raw"), &content).unwrap();
        commit(&mut client, &name, &key).await;
        let dir = Path::new(&fs).parent().unwrap().to_owned();
        while !dir.join("layer").exists() {
            if let Some(worker) = Stopped::worker(daemon.child.id()) {
                return (worker, dir, name);
            }
        }
        client.remove(RemoveSnapshotRequest { key: name, ..Default::default() }).await.unwrap();
    }
    panic!("no conversion was met at work");
}

#[tokio::test]
async fn a_layer_worker_that_is_killed_leaves_nothing_and_the_next_attempt_works() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let tmp = dir.path().join("root/tmp");
    let (worker, snapshot, name) = met_at_work(&daemon).await;
    assert!(!names(&tmp).is_empty());

    worker.kill();

    wait_for("the end of the attempt", || names(&tmp).is_empty());
    assert!(!snapshot.join("layer").exists());
    let source = prepare(&mut daemon.client().await, "default/3/vm", &name).await;
    assert_eq!(record(daemon.resolve(&source).1).disk.unwrap().virtual_size, 64 << 20);
    assert!(names(&tmp).is_empty());
}

#[tokio::test]
async fn a_daemon_that_is_killed_while_its_worker_converts_leaves_nothing_and_the_next_one_does_it() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let (worker, snapshot, name) = met_at_work(&daemon).await;

    daemon.kill();

    assert!(!names(&dir.path().join("root/tmp")).is_empty() && !snapshot.join("layer").exists());
    let daemon = Daemon::start(dir.path());
    let source = prepare(&mut daemon.client().await, "default/3/vm", &name).await;
    assert_eq!(record(daemon.resolve(&source).1).disk.unwrap().virtual_size, 64 << 20);
    assert!(names(&dir.path().join("root/tmp")).is_empty());
    // The orphan finds nobody to tell.
    worker.kill();
}

#[tokio::test]
async fn kills_between_requests_leave_store_and_directories_alike() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..6u64 {
        let daemon = Daemon::start(dir.path());
        let mut client = daemon.client().await;
        let listed = list(&mut client).await;
        let found: BTreeSet<_> =
            fs::read_dir(dir.path().join("root/s")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(listed.len(), found.len(), "{listed:?} {found:?}");
        let busy = tokio::spawn(async move {
            for step in 0u64.. {
                let (key, name) = (format!("default/{round}/a{step}"), format!("default/{round}/c{step}"));
                let request = PrepareSnapshotRequest { key: key.clone(), ..Default::default() };
                let Ok(_) = client.prepare(request).await else { return };
                let request = CommitSnapshotRequest { name: name.clone(), key, ..Default::default() };
                let Ok(_) = client.commit(request).await else { return };
                let Ok(_) = client.remove(RemoveSnapshotRequest { key: name, ..Default::default() }).await else {
                    return;
                };
            }
        });
        tokio::time::sleep(Duration::from_millis(40 + 17 * round)).await;
        daemon.kill();
        busy.await.unwrap();
    }
}

async fn list(client: &mut SnapshotsClient<Channel>) -> Vec<String> {
    client.cleanup(CleanupRequest::default()).await.unwrap();
    let mut stream = client.list(ListSnapshotsRequest::default()).await.unwrap().into_inner();
    let mut names = Vec::new();
    while let Some(batch) = stream.message().await.unwrap() {
        names.extend(batch.info.into_iter().map(|info| info.name));
    }
    names
}

#[tokio::test]
async fn what_is_no_machine_is_refused_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    let ordinary = prepare(&mut client, "default/1/ordinary", "").await;

    for (source, expected) in [("/var/lib/other/fs", "--snapshotter ovms"), (&ordinary, "ordinary container image")] {
        match daemon.resolve(source).1 {
            FromSnapshotter::Refused { kind: RefusalKind::Invalid, message } => {
                assert!(message.contains(expected), "{message}");
            }
            other => panic!("{source}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn an_ordinary_layer_above_a_machine_is_refused_at_commit() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    walked_image(&mut client).await;
    let fs = prepare(&mut client, "default/5/extract", "default/4/diff").await;
    fs::write(Path::new(&fs).join("hello"), "").unwrap();

    let request =
        CommitSnapshotRequest { name: "default/6/x".into(), key: "default/5/extract".into(), ..Default::default() };
    let status = client.commit(request).await.unwrap_err();

    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("disk layers and descriptors only"), "{}", status.message());
}

#[tokio::test]
async fn a_descriptor_that_exchanges_its_disks_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    // Snapshots under the names that containerd gives them: chain ids of the layers' tars.
    let [base, diff] = ["base", "diff"].map(|tar| Digest::of(tar.as_bytes()));
    let fs = prepare(&mut client, "default/1/extract-a", "").await;
    write_layer_with(&fs, "base", &[base], "");
    let below = base.chained_on(None);
    commit(&mut client, &format!("default/2/{below}"), "default/1/extract-a").await;
    for (number, (refs, fits)) in [([base, diff], true), ([diff, base], false)].into_iter().enumerate() {
        let key = |name: &str| format!("default/{}/{name}", 10 * (number + 1));
        let fs = prepare(&mut client, &key("extract"), &format!("default/2/{below}")).await;
        write_layer_with(&fs, "diff", &refs, "");
        let image = key(&diff.chained_on(Some(&below)).to_string());
        commit(&mut client, &image, &key("extract")).await;
        let source = prepare(&mut client, &key("vm"), &image).await;

        match daemon.resolve(&source).1 {
            FromSnapshotter::Resolved { .. } => assert!(fits),
            FromSnapshotter::Refused { kind: RefusalKind::Invalid, message } => {
                assert!(!fits, "{message}");
                assert!(message.contains(&format!("diskLayers[0].ref: is {diff}")), "{message}");
                assert!(message.contains(&format!("in this place is {base}")), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_damaged_disk_is_told_at_start_and_blocks_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let mut client = daemon.client().await;
    let fs = prepare(&mut client, "default/1/extract", "").await;
    fs::create_dir(Path::new(&fs).join("ovm")).unwrap();
    fs::write(Path::new(&fs).join("ovm/disk.qcow2"), "no qcow2").unwrap();
    commit(&mut client, "default/2/bad", "default/1/extract").await;
    let source = prepare(&mut client, "default/3/vm", "default/2/bad").await;

    let (steps, last) = daemon.resolve(&source);

    assert!(matches!(&last, FromSnapshotter::Refused { kind: RefusalKind::Invalid, .. }), "{last:?}");
    assert!(!steps.is_empty());
    walked_image_beside(&mut client).await;
    for key in ["default/3/vm", "default/2/bad"] {
        client.remove(RemoveSnapshotRequest { key: key.into(), ..Default::default() }).await.unwrap();
    }
}

async fn walked_image_beside(client: &mut SnapshotsClient<Channel>) {
    let fs = prepare(client, "default/11/extract", "").await;
    write_layer(&fs, &["base"]);
    commit(client, "default/12/base", "default/11/extract").await;
}

#[tokio::test]
async fn sockets_that_are_passed_are_served() {
    let Ok(Ok(_)) = Command::new("systemd-socket-activate")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .map(|s| s.success().then_some(()).ok_or(()))
    else {
        eprintln!("skipped: systemd-socket-activate is not installed");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let listen = |name: &str| format!("--listen={}", dir.path().join(name).display());
    let child = Command::new("systemd-socket-activate")
        .args([listen("s.sock"), listen("b.sock"), "--fdname=ovms:bundle".into()])
        .arg(format!("--setenv=OVMS_CONFIG={}", settings(dir.path(), "").display()))
        .arg(env!("CARGO_BIN_EXE_ovms-snapshotter"))
        .arg("--root")
        .arg(dir.path().join("root"))
        .args(["--address", "/nowhere/s.sock", "--bundle-address", "/nowhere/b.sock"])
        .spawn()
        .unwrap();
    let daemon = Daemon { dir: dir.path().to_owned(), child };
    wait_for("the sockets", || dir.path().join("s.sock").exists() && dir.path().join("b.sock").exists());

    let mut client = daemon.client().await;

    assert!(list(&mut client).await.is_empty());
    assert!(matches!(daemon.resolve("/x/fs").1, FromSnapshotter::Refused { .. }));
}
