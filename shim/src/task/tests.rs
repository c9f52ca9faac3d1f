use std::fs;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::types::mount::Mount;
use ovms_engine::{BootChoice, OnIncompatible};
use serde_json::{json, Value};
use tempfile::TempDir;
use tokio::sync::{mpsc, Notify};

use super::stub::{Saving, Stub, PID};
use super::*;
use crate::events::{Event, Item};
use crate::stdio::Stdio;

struct Bed {
    tasks: Arc<Tasks>,
    stub: Stub,
    events: mpsc::Receiver<Item>,
    ended: Arc<Notify>,
    dir: TempDir,
}

fn bed() -> Bed {
    let (events, receiver) = Events::queue();
    let (stub, ended) = (Stub::default(), Arc::new(Notify::new()));
    let setup = Setup { namespace: "default".into(), maker: Arc::new(stub.clone()), events, ended: ended.clone() };
    Bed { tasks: Arc::new(Tasks::new(setup)), stub, events: receiver, ended, dir: tempfile::tempdir().unwrap() }
}

impl Bed {
    fn request(&self, change: impl FnOnce(&mut Value)) -> CreateRequest {
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": {"args": ["/ovm/boot"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "network"}]}
        });
        change(&mut spec);
        fs::write(self.dir.path().join("config.json"), spec.to_string()).unwrap();
        CreateRequest {
            id: "vm1".into(),
            bundle: self.dir.path().into(),
            rootfs: vec![bind("/snapshots/7")],
            ..CreateRequest::default()
        }
    }

    async fn created(&self) {
        assert_eq!(self.tasks.create(self.request(|_| ())).await.unwrap(), PID);
    }

    /// A request for a directory that is not there yet.
    fn checkpoint(&self, exit: bool) -> CheckpointRequest {
        CheckpointRequest { dir: self.dir.path().join("checkpoint"), exit }
    }

    fn topics(&mut self) -> Vec<&'static str> {
        let topic = |item| match item {
            Item::Event(_, event) => event.topic(),
            Item::Mark(_) => "mark",
        };
        std::iter::from_fn(|| self.events.try_recv().ok()).map(topic).collect()
    }
}

fn bind(source: &str) -> Mount {
    Mount { type_: "bind".into(), source: source.into(), options: vec!["rbind".into()], ..Default::default() }
}

#[tokio::test]
async fn a_life_has_its_events_in_order_and_its_exit_told_to_all() {
    let mut bed = bed();
    bed.created().await;
    assert_eq!(bed.tasks.state("vm1", "").unwrap().status, Status::Created);
    let waiters: Vec<_> = (0..3)
        .map(|_| {
            let tasks = bed.tasks.clone();
            tokio::spawn(async move { tasks.wait("vm1", "").await.unwrap().status })
        })
        .collect();

    assert_eq!(bed.tasks.start("vm1", "").await.unwrap(), PID);
    bed.tasks.pause("vm1").await.unwrap();
    assert_eq!(bed.tasks.state("vm1", "").unwrap().status, Status::Paused);
    bed.tasks.resume("vm1").await.unwrap();
    bed.stub.end(134, false);

    for waiter in waiters {
        assert_eq!(waiter.await.unwrap(), 134);
    }
    let stopped = bed.tasks.state("vm1", "").unwrap();
    assert_eq!((stopped.status, stopped.exit.unwrap().status), (Status::Stopped, 134));
    assert_eq!(bed.tasks.pids("vm1").unwrap(), [PID]);
    let (pid, exit) = bed.tasks.delete("vm1", "").await.unwrap();
    assert_eq!((pid, exit.status), (PID, 134));
    assert_eq!(
        bed.topics(),
        ["/tasks/create", "/tasks/start", "/tasks/paused", "/tasks/resumed", "/tasks/exit", "/tasks/delete"]
    );
    assert_eq!(bed.stub.asked(), ["create /snapshots/7/bundle.json", "start", "pause", "resume", "delete"]);
    assert_eq!(bed.tasks.state("vm1", "").unwrap_err().kind(), Kind::NotFound);
}

#[tokio::test]
async fn an_exit_during_start_does_not_overtake_it() {
    let mut bed = bed();
    bed.created().await;
    bed.stub.slow_start(Duration::from_millis(200));
    let tasks = bed.tasks.clone();
    let starting = tokio::spawn(async move { tasks.start("vm1", "").await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    bed.stub.end(0, false);

    assert_eq!(bed.tasks.wait("vm1", "").await.unwrap().status, 0);
    starting.await.unwrap().unwrap();
    assert_eq!(bed.topics(), ["/tasks/create", "/tasks/start", "/tasks/exit"]);
    assert_eq!(bed.tasks.state("vm1", "").unwrap().status, Status::Stopped);
}

#[tokio::test]
async fn an_oom_kill_is_told_before_the_exit() {
    let mut bed = bed();
    bed.created().await;
    bed.tasks.start("vm1", "").await.unwrap();
    bed.stub.end(137, true);
    bed.tasks.wait("vm1", "").await.unwrap();
    assert_eq!(bed.topics(), ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit"]);
}

#[tokio::test]
async fn create_twice_returns_already_exists() {
    let bed = bed();
    bed.created().await;
    let err = bed.tasks.create(bed.request(|_| ())).await.unwrap_err();
    assert_eq!(err.kind(), Kind::AlreadyExists);
}

#[tokio::test]
async fn create_failed_leaves_the_name_free_and_says_nothing() {
    let mut bed = bed();
    bed.stub.fail_create(Kind::Unavailable);
    let err = bed.tasks.create(bed.request(|_| ())).await.unwrap_err();
    assert_eq!((err.kind(), err.chain().as_str()), (Kind::Unavailable, "no machine today"));
    assert_eq!(bed.tasks.state("vm1", "").unwrap_err().kind(), Kind::NotFound);
    assert!(bed.topics().is_empty());
}

#[tokio::test]
async fn create_with_a_failing_hook_undoes_the_machine() {
    let mut bed = bed();
    let request = bed.request(|spec| spec["hooks"] = json!({"createRuntime": [{"path": "/bin/false"}]}));
    let err = bed.tasks.create(request).await.unwrap_err();
    assert!(err.chain().contains("createRuntime hook /bin/false"), "{}", err.chain());
    assert_eq!(bed.stub.asked(), ["create /snapshots/7/bundle.json", "Kill", "delete"]);
    assert!(bed.topics().is_empty());
    bed.tasks.shutdown();
    tokio::time::timeout(Duration::from_secs(1), bed.ended.notified()).await.unwrap();
}

#[tokio::test]
async fn create_of_a_foreign_rootfs_returns_the_way_out() {
    let bed = bed();
    let overlay = Mount { type_: "overlay".into(), source: "overlay".into(), ..Default::default() };
    for rootfs in [vec![], vec![overlay.clone()], vec![overlay, bind("/x")]] {
        let mut request = bed.request(|_| ());
        request.rootfs = rootfs;
        let err = bed.tasks.create(request).await.unwrap_err();
        assert_eq!(err.kind(), Kind::Invalid);
        assert!(err.chain().contains("--snapshotter ovms"), "{}", err.chain());
    }
    assert!(bed.stub.asked().is_empty());
}

#[tokio::test]
async fn create_with_arguments_of_the_user_returns_them() {
    let bed = bed();
    let request = bed.request(|spec| spec["process"]["args"] = json!(["ls", "-l"]));
    let err = bed.tasks.create(request).await.unwrap_err();
    assert_eq!(err.kind(), Kind::Invalid);
    assert!(err.chain().contains("process.args") && err.chain().contains("\"ls\""), "{}", err.chain());
    assert!(bed.stub.asked().is_empty());
}

#[tokio::test]
async fn the_spec_and_the_streams_reach_the_machine() {
    let bed = bed();
    let mut request = bed.request(|spec| {
        spec["root"] = json!({"path": "rootfs", "readonly": true});
        spec["hostname"] = json!("web");
        spec["annotations"] = json!({"io.ovms.kernel-args": "quiet"});
        spec["linux"]["cgroupsPath"] = json!("/default/vm1");
        spec["linux"]["resources"] = json!({"memory": {"limit": 1 << 28}, "cpu": {"quota": 150000, "period": 100000}});
        spec["linux"]["namespaces"] = json!([{"type": "network", "path": "/run/netns/a"}, {"type": "pid"}]);
    });
    request.stdio.stdout = format!("file://{}", bed.dir.path().join("log").display());
    bed.tasks.create(request).await.unwrap();

    let spec = bed.stub.spec();
    assert_eq!((spec.id.as_str(), spec.namespace.as_str(), spec.hostname.as_str()), ("vm1", "default", "web"));
    assert_eq!(spec.extra_kernel_args.as_deref(), Some("quiet"));
    assert_eq!(spec.cgroups_path.as_deref(), Some("/default/vm1"));
    assert_eq!(spec.netns.as_deref(), Some(std::path::Path::new("/run/netns/a")));
    assert_eq!((spec.wishes.spec_memory, spec.wishes.spec_cpu_quota), (Some(1 << 28), Some(150_000)));
    assert_eq!(spec.limits.memory, Some(1 << 28));
    assert!(spec.read_only && spec.stdio.stdout.is_some() && spec.stdio.stdin.is_none());
}

#[tokio::test]
async fn kill_maps_signals_and_finds_nothing_when_the_machine_has_ended() {
    let bed = bed();
    bed.created().await;
    bed.tasks.start("vm1", "").await.unwrap();
    bed.tasks.kill("vm1", "", 0).await.unwrap();
    bed.tasks.kill("vm1", "", 28).await.unwrap();
    bed.tasks.kill("vm1", "", 15).await.unwrap();
    assert_eq!(bed.tasks.kill("vm1", "", 10).await.unwrap_err().kind(), Kind::Unimplemented);
    assert_eq!(bed.tasks.kill("vm1", "", 99).await.unwrap_err().kind(), Kind::Invalid);
    bed.tasks.kill("vm1", "", 9).await.unwrap();
    assert_eq!(bed.tasks.wait("vm1", "").await.unwrap().status, 137);
    let err = bed.tasks.kill("vm1", "", 9).await.unwrap_err();
    assert_eq!(err.kind(), Kind::NotFound);
    assert!(err.chain().contains("process already finished"), "{}", err.chain());
    assert_eq!(bed.stub.asked()[1..], ["start", "PowerButton", "Kill"]);
}

#[tokio::test]
async fn a_created_machine_can_be_killed_and_deleted() {
    let mut bed = bed();
    bed.created().await;
    assert_eq!(bed.tasks.delete("vm1", "").await.unwrap_err().kind(), Kind::Precondition);
    bed.tasks.kill("vm1", "", 9).await.unwrap();
    bed.tasks.wait("vm1", "").await.unwrap();
    assert_eq!(bed.tasks.start("vm1", "").await.unwrap_err().kind(), Kind::Precondition);
    bed.tasks.delete("vm1", "").await.unwrap();
    assert_eq!(bed.topics(), ["/tasks/create", "/tasks/exit", "/tasks/delete"]);
}

#[tokio::test]
async fn exec_says_why_not() {
    let bed = bed();
    bed.created().await;
    let exec = bed.tasks.exec("vm1").unwrap_err();
    assert_eq!(exec.kind(), Kind::Unimplemented);
    assert!(exec.chain().contains("no agent"), "{}", exec.chain());
    assert_eq!(bed.tasks.state("vm1", "shell").unwrap_err().kind(), Kind::NotFound);
    assert_eq!(bed.tasks.start("vm1", "shell").await.unwrap_err().kind(), Kind::NotFound);
    assert_eq!(bed.tasks.exec("vm2").unwrap_err().kind(), Kind::NotFound);
}

#[tokio::test]
async fn the_size_of_a_terminal_reaches_the_machine_and_no_terminal_has_none() {
    for (terminal, expected) in [(true, vec!["resize 80x25"]), (false, vec![])] {
        let bed = bed();
        let mut request = bed.request(|_| ());
        request.stdio = Stdio { terminal, ..Stdio::default() };
        bed.tasks.create(request).await.unwrap();
        bed.tasks.resize("vm1", "", 80, 25).await.unwrap();
        assert_eq!(bed.stub.asked()[1..], expected);
    }
}

#[tokio::test]
async fn update_and_stats_reach_the_machine_while_it_lives() {
    let bed = bed();
    bed.created().await;
    bed.tasks.update("vm1", br#"{"memory": {"limit": 1073741824}}"#).await.unwrap();
    assert_eq!(bed.stub.asked()[1..], ["update Some(1073741824)"]);
    assert_eq!(bed.tasks.stats("vm1").await.unwrap().type_url, "io.containerd.cgroups.v2.Metrics");
    bed.stub.end(0, false);
    bed.tasks.wait("vm1", "").await.unwrap();
    assert_eq!(bed.tasks.stats("vm1").await.unwrap_err().kind(), Kind::NotFound);
    assert_eq!(bed.tasks.update("vm1", b"{}").await.unwrap_err().kind(), Kind::NotFound);
}

#[tokio::test]
async fn pause_and_resume_out_of_turn_return_precondition() {
    let bed = bed();
    bed.created().await;
    assert_eq!(bed.tasks.pause("vm1").await.unwrap_err().kind(), Kind::Precondition);
    bed.tasks.start("vm1", "").await.unwrap();
    assert_eq!(bed.tasks.resume("vm1").await.unwrap_err().kind(), Kind::Precondition);
    assert_eq!(bed.tasks.start("vm1", "").await.unwrap_err().kind(), Kind::Precondition);
}

#[tokio::test]
async fn connect_knows_its_container_and_says_0_for_others() {
    let bed = bed();
    bed.created().await;
    assert_eq!((bed.tasks.connect("vm1"), bed.tasks.connect("vm2")), (PID, 0));
}

#[tokio::test]
async fn shutdown_waits_for_the_last_container() {
    let bed = bed();
    bed.created().await;
    bed.tasks.shutdown();
    assert!(tokio::time::timeout(Duration::from_millis(50), bed.ended.notified()).await.is_err());
    bed.stub.end(0, false);
    bed.tasks.wait("vm1", "").await.unwrap();
    bed.tasks.delete("vm1", "").await.unwrap();
    bed.tasks.shutdown();
    tokio::time::timeout(Duration::from_secs(1), bed.ended.notified()).await.unwrap();
}

#[tokio::test]
async fn end_all_kills_and_frees() {
    let bed = bed();
    bed.created().await;
    bed.tasks.start("vm1", "").await.unwrap();
    bed.tasks.end_all().await;
    assert_eq!(bed.stub.asked()[1..], ["start", "Kill", "delete"]);
}

#[tokio::test]
async fn a_create_that_containerd_has_given_up_leaves_nothing() {
    let mut bed = bed();
    bed.tasks.close().await;
    let err = bed.tasks.create(bed.request(|_| ())).await.unwrap_err();
    assert_eq!(err.kind(), Kind::Unavailable);
    assert!(bed.stub.asked().is_empty());
    assert!(bed.topics().is_empty());
}

#[tokio::test]
async fn close_waits_for_a_machine_that_is_being_made_and_has_it_undone() {
    let bed = bed();
    let request = bed.request(|spec| {
        spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "0.3"]}]});
    });
    let tasks = bed.tasks.clone();
    let creating = tokio::spawn(async move { tasks.create(request).await });
    while bed.stub.asked().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bed.tasks.close().await;
    assert_eq!(bed.stub.asked(), ["create /snapshots/7/bundle.json", "Kill", "delete"]);
    assert_eq!(creating.await.unwrap().unwrap_err().kind(), Kind::Unavailable);
}

#[tokio::test]
async fn a_checkpoint_leaves_running_machines_running_and_paused_ones_paused() {
    let mut bed = bed();
    bed.created().await;
    bed.tasks.start("vm1", "").await.unwrap();
    let request = bed.checkpoint(false);
    bed.tasks.checkpoint("vm1", request.clone()).await.unwrap();
    assert_eq!(bed.tasks.state("vm1", "").unwrap().status, Status::Running);

    bed.tasks.pause("vm1").await.unwrap();
    fs::remove_file(request.dir.join("ram")).unwrap();
    bed.tasks.checkpoint("vm1", request.clone()).await.unwrap();

    assert_eq!(bed.tasks.state("vm1", "").unwrap().status, Status::Paused);
    assert_eq!(
        bed.topics(),
        ["/tasks/create", "/tasks/start", "/tasks/checkpointed", "/tasks/paused", "/tasks/checkpointed"]
    );
    assert!(request.dir.join("ram").exists());
}

#[tokio::test]
async fn a_checkpoint_with_exit_ends_the_machine_after_it_is_saved() {
    let mut bed = bed();
    bed.created().await;
    bed.tasks.start("vm1", "").await.unwrap();

    bed.tasks.checkpoint("vm1", bed.checkpoint(true)).await.unwrap();

    assert_eq!(bed.tasks.wait("vm1", "").await.unwrap().status, 137);
    assert_eq!(bed.topics(), ["/tasks/create", "/tasks/start", "/tasks/checkpointed", "/tasks/exit"]);
    assert_eq!(bed.stub.asked()[1..], ["start", "save stop=true", "Kill"]);
}

#[tokio::test]
async fn checkpoint_failed_leaves_the_machine_and_no_directory() {
    let mut bed = bed();
    bed.created().await;
    let request = bed.checkpoint(true);
    let err = bed.tasks.checkpoint("vm1", request.clone()).await.unwrap_err();
    assert_eq!(err.kind(), Kind::Precondition);
    bed.tasks.start("vm1", "").await.unwrap();
    bed.stub.saving(Saving::Fails);

    let err = bed.tasks.checkpoint("vm1", request.clone()).await.unwrap_err();

    assert!(err.chain().contains("the disk is full"), "{}", err.chain());
    assert_eq!(bed.tasks.state("vm1", "").unwrap().status, Status::Running);
    assert!(!request.dir.exists());
    assert_eq!(bed.topics(), ["/tasks/create", "/tasks/start"]);
}

#[tokio::test]
async fn a_checkpoint_whose_directory_is_taken_away_is_given_up() {
    let bed = bed();
    bed.created().await;
    bed.tasks.start("vm1", "").await.unwrap();
    bed.stub.saving(Saving::Hangs);
    let request = bed.checkpoint(false);
    fs::create_dir(&request.dir).unwrap();
    let (tasks, dir) = (bed.tasks.clone(), request.dir.clone());
    let saving = tokio::spawn(async move { tasks.checkpoint("vm1", request).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!saving.is_finished());

    fs::remove_dir(&dir).unwrap();

    let err = saving.await.unwrap().unwrap_err();
    assert!(err.chain().contains("nobody wants it"), "{}", err.chain());
    assert_eq!(bed.tasks.state("vm1", "").unwrap().status, Status::Running);
}

#[tokio::test]
async fn checkpoint_into_a_full_or_relative_directory_returns_invalid() {
    let bed = bed();
    bed.created().await;
    bed.tasks.start("vm1", "").await.unwrap();
    let full = CheckpointRequest { dir: bed.dir.path().into(), exit: false };
    let err = bed.tasks.checkpoint("vm1", full).await.unwrap_err();
    assert_eq!(err.kind(), Kind::Invalid);
    assert!(err.chain().contains("is not empty"), "{}", err.chain());
    let relative = CheckpointRequest { dir: "checkpoint".into(), exit: false };
    assert_eq!(bed.tasks.checkpoint("vm1", relative).await.unwrap_err().kind(), Kind::Invalid);
    assert_eq!(bed.stub.asked()[1..], ["start"]);
}

#[tokio::test]
async fn create_from_a_checkpoint_hands_it_on_and_tells_it() {
    let mut bed = bed();
    let checkpoint = "/run/ctrd-checkpoint1".to_owned();
    let request = CreateRequest { checkpoint: checkpoint.clone(), ..bed.request(|_| ()) };

    bed.tasks.create(request).await.unwrap();

    assert_eq!(bed.stub.asked()[0], "resolve /run/ctrd-checkpoint1 over /snapshots/7");
    let Ok(Item::Event(_, Event::Create(event))) = bed.events.try_recv() else { panic!("no event of the creation") };
    assert_eq!(event.checkpoint, checkpoint);
}

#[tokio::test]
async fn what_annotations_say_of_ram_reaches_the_machine_unless_a_checkpoint_outdoes_it() {
    let wishes = |spec: &mut Value| {
        spec["annotations"] = json!({"io.ovms.boot": "cold", "io.ovms.on-incompatible": "boot"});
    };
    for (checkpoint, boot) in [("", BootChoice::Cold), ("/run/ctrd-checkpoint1", BootChoice::Auto)] {
        let bed = bed();
        let request = CreateRequest { checkpoint: checkpoint.into(), ..bed.request(wishes) };
        bed.tasks.create(request).await.unwrap();
        let spec = bed.stub.spec();
        assert_eq!((spec.boot, spec.on_incompatible), (boot, OnIncompatible::Boot), "{checkpoint}");
    }
}
