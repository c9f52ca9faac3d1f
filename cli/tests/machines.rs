//! Machines in the background: run -d, ps, logs, inspect, snapshot, stop, rm, with bare-metal guests and a registry.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{Host, Registry, Said};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

impl Host {
    fn ovm(&self, args: &[&str]) -> Said {
        self.command().current_dir(self.dir.path()).args(args).output().unwrap().into()
    }

    fn ok(&self, args: &[&str]) -> String {
        let said = self.ovm(args);
        assert_eq!(said.code, Some(0), "ovm {args:?}: {}", said.err);
        said.out
    }

    /// The layout that boots the guest `name`, as it is called in the directory that `ovm` runs in.
    fn named(&self, name: &str) -> String {
        self.layout(name);
        name.to_owned()
    }

    fn ps(&self) -> Vec<Value> {
        serde_json::from_str(&self.ok(&["ps", "--json"])).unwrap()
    }

    fn state(&self, id: &str) -> Option<String> {
        let found = self.ps().into_iter().find(|machine| machine["id"] == id);
        found.map(|machine| machine["state"].as_str().unwrap().to_owned())
    }

    /// Waits until the machine's console holds `text`.
    fn expect(&self, id: &str, text: &str) -> String {
        let begin = Instant::now();
        loop {
            let said = self.ok(&["logs", id]);
            if said.contains(text) {
                return said;
            }
            assert!(begin.elapsed() < PATIENCE, "no {text:?} in {said:?}");
            sleep(Duration::from_millis(20));
        }
    }

    /// Nothing of any machine is left.
    fn assert_clean(&self) {
        for dir in ["state/run", "state/scratch", "runtime/machines/ovm", "runtime/uids"] {
            let left: Vec<PathBuf> =
                fs::read_dir(self.dir.path().join(dir)).into_iter().flatten().map(|e| e.unwrap().path()).collect();
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A test that failed leaves machines behind.
        let names: Vec<String> = self.ps().iter().map(|machine| machine["id"].as_str().unwrap().to_owned()).collect();
        for name in names {
            self.ovm(&["rm", "-f", &name]);
        }
    }
}

/// The numbers that the guest `spin` has counted.
fn ticks(said: &str) -> Vec<u32> {
    said.lines().filter_map(|line| line.strip_prefix("tick ")?.parse().ok()).collect()
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_detached_machine_is_listed_inspected_stopped_and_removed() {
    let host = Host::new(5);
    let layout = host.named("spin");
    assert_eq!(host.ok(&["run", "-d", "--name", "a", &layout]), "a\n");
    host.expect("a", "tick 1\n");

    let machine = host.ps().pop().unwrap();
    assert_eq!(
        (&machine["id"], &machine["namespace"], &machine["state"], &machine["image"], &machine["memoryBytes"]),
        (&"a".into(), &"ovm".into(), &"running".into(), &"spin".into(), &(64 << 20).into())
    );
    let pid = machine["pid"].as_u64().unwrap();
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    let taken = host.ovm(&["run", "-d", "--name", "a", &layout]);
    assert_eq!(taken.code, Some(73));
    assert!(taken.err.contains("there is a machine a already"), "{}", taken.err);
    let early = host.ovm(&["rm", "a"]);
    assert_eq!(
        (early.code, early.err.as_str()),
        (Some(75), "ovm: a is running: stop it first (ovm stop), or use --force\n")
    );

    let inspected: Value = serde_json::from_str(&host.ok(&["inspect", "--json", "ovm/a"])).unwrap();
    let steps: Vec<&str> =
        inspected["timeline"].as_array().unwrap().iter().filter_map(|s| s["step"].as_str()).collect();
    for step in ["arguments", "template", "files", "spawned", "configured"] {
        assert!(steps.contains(&step), "{step} in {steps:?}");
    }
    assert!(host.ok(&["inspect", "a"]).contains(" ms "));

    host.ok(&["stop", "a"]);
    let machine = host.ps().pop().unwrap();
    assert_eq!(
        (&machine["state"], &machine["exit"]["status"], &machine["pid"]),
        (&"stopped".into(), &0.into(), &Value::Null)
    );
    assert!(host.ok(&["logs", "a"]).contains("power button\n"));
    assert_eq!(host.ok(&["rm", "a"]), "a\n");
    assert_eq!(host.ovm(&["rm", "a"]).code, Some(66));
    host.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn ends_of_detached_machines_are_kept_or_not_as_asked() {
    let host = Host::new(5);
    host.ok(&["run", "-d", "--name", "p", &host.named("panic")]);
    let begin = Instant::now();
    while host.state("p").as_deref() != Some("stopped") {
        assert!(begin.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20));
    }
    assert_eq!(host.ps()[0]["exit"]["status"], 134);
    host.ok(&["rm", "p"]);

    host.ok(&["run", "-d", "--rm", "--name", "r", &host.named("hello")]);
    let begin = Instant::now();
    while host.state("r").is_some() || fs::read_dir(host.dir.path().join("state/run")).unwrap().count() > 0 {
        assert!(begin.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20));
    }
    host.ok(&["run", "-d", "--name", "f", &host.named("echo")]);
    host.ok(&["rm", "-f", "f"]);
    host.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn what_a_detached_start_meets_is_told_to_the_one_who_asked() {
    let host = Host::new(5);
    let layout = host.named("hello");
    let said = host.ovm(&["run", "-d", "--memory", "1M", &layout]);
    assert_eq!(said.code, Some(65));
    assert_eq!(said.err, "ovm: --memory asks for 1048576 bytes of memory; a machine has 32 MiB to 1 TiB\n");
    assert_eq!(host.ovm(&["run", "-d", "no-such-image"]).code, Some(66));
    host.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn snapshots_of_clones_go_on_counting_through_a_registry() {
    let registry = Registry::start();
    let host = Host::new(5);
    host.ok(&["run", "-d", "--name", "a", &host.named("spin")]);
    host.expect("a", "tick 2\n");
    let (one, two) = (format!("{}/demo/spin:1", registry.address), format!("{}/demo/spin:2", registry.address));

    let digest = host.ok(&["snapshot", "-q", "a", "-t", &one]);
    let before = ticks(&host.ok(&["logs", "a"]));
    // The machine goes on, and another host resumes what it was.
    host.expect("a", &format!("tick {}\n", before.last().unwrap() + 2));
    let other = Host::new(5);
    assert_eq!(other.ok(&["pull", "-q", &one]), digest);
    assert!(other.ok(&["ls"]).contains("from RAM"));
    other.ok(&["run", "-d", "--name", "b", &one]);
    other.expect("b", "tick");
    let first = ticks(&other.ok(&["logs", "b"]))[0];
    assert!(first > 2 && first <= before.last().unwrap() + 2, "{first} after {before:?}");

    // A clone's snapshot builds on the RAM that it came from.
    other.expect("b", &format!("tick {}\n", first + 3));
    let pushed = other.ovm(&["snapshot", "b", "-t", &two]);
    assert_eq!(pushed.code, Some(0), "{}", pushed.err);
    let shown: Value = serde_json::from_str(&other.ok(&["inspect", "--json", &two])).unwrap();
    assert_ne!(shown["ramSnapshot"]["digest"], Value::Null);
    host.ok(&["pull", "-q", &two]);
    host.ok(&["validate", "-q", "--tag", &two, "state/store"]);
    host.ok(&["run", "-d", "--name", "c", &two]);
    host.expect("c", "tick");
    let second = ticks(&host.ok(&["logs", "c"]))[0];
    assert!(second >= first + 3, "{second} after {first}");
    // The same image boots from its beginning if asked.
    host.ok(&["run", "-d", "--name", "d", "--boot", "cold", &two]);
    assert_eq!(ticks(&host.expect("d", "tick 1\n"))[0], 0);

    host.ok(&["rm", "-f", "a", "c", "d"]);
    other.ok(&["rm", "-f", "b"]);
    host.assert_clean();
    other.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_snapshot_with_stop_ends_the_machine_and_a_missing_base_is_told() {
    let host = Host::new(5);
    let layout = host.named("spin");
    host.ok(&["run", "-d", "--name", "a", &layout]);
    host.expect("a", "tick 1\n");
    fs::rename(host.dir.path().join("spin"), host.dir.path().join("away")).unwrap();
    let said = host.ovm(&["snapshot", "a", "-t", "x:1"]);
    assert_eq!(said.code, Some(66), "{}", said.err);
    assert!(said.err.contains("no longer in"), "{}", said.err);
    fs::rename(host.dir.path().join("away"), host.dir.path().join("spin")).unwrap();

    host.ok(&["snapshot", "--stop", "--preload", "--mlock", "-o", "out", "a", "-t", "x:1"]);

    let begin = Instant::now();
    while host.state("a").as_deref() != Some("stopped") {
        assert!(begin.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20));
    }
    let ended = host.ovm(&["snapshot", "a", "-t", "x:2"]);
    assert!(ended.err.contains("has ended") && ended.code == Some(75), "{}", ended.err);
    let shown: Value = serde_json::from_str(&host.ok(&["inspect", "--json", "out"])).unwrap();
    let ram = &shown["manifest"]["ramSnapshot"];
    assert_eq!((&ram["preload_hint"], &ram["mlock_required"]), (&true.into(), &true.into()));
    host.ok(&["validate", "-q", "out"]);
    host.ok(&["rm", "a"]);
    host.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_killed_snapshot_leaves_no_memory_behind_after_the_next_one() {
    let host = Host::new(5);
    host.ok(&["run", "-d", "--name", "a", &host.named("spin")]);
    host.expect("a", "tick 1\n");
    let scratch = host.dir.path().join("state/scratch");
    let names = || -> Vec<_> { fs::read_dir(&scratch).into_iter().flatten().map(|e| e.unwrap().file_name()).collect() };
    // One that has no lock yet holds nothing, and is not taken for left within its first minute.
    let at_work = || names().iter().any(|name| !name.to_string_lossy().starts_with('.'));
    // Killed while its directory is there; one that was quicker is tried again.
    let begin = Instant::now();
    while !at_work() {
        assert!(begin.elapsed() < PATIENCE, "no snapshot was met at work");
        let mut command = host.command();
        let mut taking =
            command.current_dir(host.dir.path()).args(["snapshot", "-q", "a", "-t", "x:1"]).spawn().unwrap();
        while !at_work() && taking.try_wait().unwrap().is_none() {
            sleep(Duration::from_micros(200));
        }
        taking.kill().unwrap();
        taking.wait().unwrap();
    }

    // The machine may still be giving the killed one up.
    let begin = Instant::now();
    while host.ovm(&["snapshot", "-q", "a", "-t", "x:2"]).code != Some(0) {
        assert!(begin.elapsed() < PATIENCE, "no snapshot after the killed one");
        sleep(Duration::from_millis(20));
    }

    assert!(names().is_empty(), "{:?} left", names());
    let named: usize = fs::read_dir(host.dir.path().join("state/store/blobs/sha256"))
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'))
        .count();
    assert_eq!(named, 0, "half a blob is left in the store");
    host.ok(&["rm", "-f", "a"]);
    host.assert_clean();
}
