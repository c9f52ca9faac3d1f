//! The threads that copy. They are started with the machine and wait: a thread cannot be started behind the walls.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{mpsc, Arc};
use std::thread::Builder;

use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

/// Bytes of stack: compressing a chunk needs 16 KiB.
const STACK_BYTES: usize = 256 << 10;

/// What every member of the crew does at the same time, each a share of it.
pub(super) trait Task: Send + Sync {
    /// Works until nothing of the task is left.
    fn work(&self);
    /// A member panicked: the task has failed.
    fn panicked(&self);
}

/// The threads.
pub(super) struct Crew {
    members: Vec<mpsc::Sender<Arc<dyn Task>>>,
    finished: Arc<EventFd>,
}

impl Crew {
    /// Starts `count` threads that first call `enter`, and waits until all have.
    pub(super) fn start(count: usize, enter: &Arc<dyn Fn() + Send + Sync>) -> io::Result<Self> {
        let finished = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let mut members = Vec::with_capacity(count);
        let (entered, entries) = mpsc::channel();
        for number in 0..count {
            let (sender, tasks) = mpsc::channel();
            let (enter, finished, entered) = (Arc::clone(enter), Arc::clone(&finished), entered.clone());
            Builder::new().name(format!("copy{number}")).stack_size(STACK_BYTES).spawn(move || {
                enter();
                let _ = entered.send(());
                drop(entered);
                serve(&tasks, &finished);
            })?;
            members.push(sender);
        }
        drop(entered);
        entries.iter().take(count).for_each(drop);
        Ok(Self { members, finished })
    }

    /// Gives `task` to everybody; returns how many there are. The task before must be finished.
    pub(super) fn give(&self, task: &Arc<dyn Task>) -> u64 {
        // A member that is gone had no panic of ours to survive; the others do its share.
        self.members.iter().filter(|member| member.send(Arc::clone(task)).is_ok()).count() as u64
    }

    /// How many have finished since the last call. They hold nothing of the task any more.
    pub(super) fn finished(&self) -> u64 {
        self.finished.read().unwrap_or(0)
    }
}

impl AsRawFd for Crew {
    /// Readable when somebody has finished.
    fn as_raw_fd(&self) -> RawFd {
        self.finished.as_raw_fd()
    }
}

fn serve(tasks: &mpsc::Receiver<Arc<dyn Task>>, finished: &EventFd) {
    while let Ok(task) = tasks.recv() {
        if catch_unwind(AssertUnwindSafe(|| task.work())).is_err() {
            task.panicked();
        }
        drop(task);
        let _ = finished.write(1);
    }
}
