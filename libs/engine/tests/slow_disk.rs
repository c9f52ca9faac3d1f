//! A machine whose disk does not answer for longer than a VMM that says nothing is given.

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::Host;
use ovms_engine::State;
use tempfile::TempDir;

/// Longer than the engine waits for an answer.
const OUTAGE: Duration = Duration::from_secs(23);

/// A file system over a directory, which can be stopped.
struct Stoppable<'a>(&'a str);

impl<'a> Stoppable<'a> {
    fn over(dir: &'a TempDir) -> Self {
        let this = Self(dir.path().to_str().unwrap());
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 << 20).unwrap();
        let image = image.path().to_str().unwrap();
        assert!(tool("mkfs.ext4", &["-q", image]) && tool("mount", &["-o", "loop", image, this.0]));
        this
    }
}

impl Drop for Stoppable<'_> {
    fn drop(&mut self) {
        tool("fsfreeze", &["-u", self.0]);
        tool("umount", &["-l", self.0]);
    }
}

fn tool(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).stderr(Stdio::null()).status().unwrap().success()
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn pause_waits_for_a_disk_that_is_slower_than_a_silent_vmm_may_be() {
    let runtime = tempfile::tempdir().unwrap();
    let host = Host::with(|settings| settings.paths.runtime = runtime.path().to_owned());
    let place = Stoppable::over(&host.dir);
    // It writes to its disk without end, until the power button.
    let (machine, mut console) = host.run("dma");
    console.expect("dma\n");
    assert!(tool("fsfreeze", &["-f", place.0]));
    std::thread::sleep(Duration::from_millis(500));
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| machine.pause());
        while begin.elapsed() < OUTAGE {
            std::thread::sleep(Duration::from_millis(500));
            assert!(!pausing.is_finished(), "{:?}", machine.status());
        }
        let status = machine.vmm_status().unwrap();
        assert!(status.owes, "{status:?}");
        machine.power_button().unwrap();
        assert!(tool("fsfreeze", &["-u", place.0]));
        pausing.join().unwrap().unwrap();
    });
    assert_eq!(machine.status().state, State::Paused);
    machine.resume().unwrap();
    let exit = machine.wait_timeout(common::PATIENCE).unwrap();
    assert_eq!(exit.status, 0, "{exit:?}");
    machine.delete().unwrap();
}
