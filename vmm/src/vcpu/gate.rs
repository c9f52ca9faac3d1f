//! Where processors wait while they must not run.
//!
//! ```text
//!            open()                    every vCPU stands
//!   Closed ─────────> Open ──close()──> Closed            finish() from anywhere: threads end
//! ```
//!
//! The owner asks, then kicks the processors out of the guest ([`super::run::Thread::kick`]); a processor asks
//! [`Gate::wanted`] before each entry. [`Gate::wait_all_standing`] is the acknowledgement: after it no processor is
//! inside KVM_RUN, and each has completed the instruction whose exit it had handled.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What the owner wants of the processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Stand still.
    Stand,
    /// Run the guest.
    Run,
    /// End the thread.
    Finish,
}

#[derive(Debug, Default)]
struct Inner {
    standing: usize,
}

/// One gate for all processors of a machine.
#[derive(Debug)]
pub struct Gate {
    wanted: AtomicU8,
    inner: Mutex<Inner>,
    changed: Condvar,
    vcpus: usize,
}

const STAND: u8 = 0;
const RUN: u8 = 1;
const FINISH: u8 = 2;

impl Gate {
    /// A closed gate for `vcpus` processors.
    pub fn new(vcpus: usize) -> Self {
        Self { wanted: AtomicU8::new(STAND), inner: Mutex::default(), changed: Condvar::new(), vcpus }
    }

    /// What the owner wants now.
    pub fn wanted(&self) -> Wanted {
        match self.wanted.load(Ordering::SeqCst) {
            STAND => Wanted::Stand,
            RUN => Wanted::Run,
            _ => Wanted::Finish,
        }
    }

    /// Says what the processors shall do from now on. Nothing changes after [`Wanted::Finish`]. Processors inside the
    /// guest learn of it when they are kicked.
    pub fn set(&self, wanted: Wanted) {
        let value = match wanted {
            Wanted::Stand => STAND,
            Wanted::Run => RUN,
            Wanted::Finish => FINISH,
        };
        let _inner = self.lock();
        if self.wanted.load(Ordering::SeqCst) != FINISH {
            self.wanted.store(value, Ordering::SeqCst);
        }
        self.changed.notify_all();
    }

    /// Stands, as one of the processors, until it may run or must end.
    pub fn stand(&self) {
        let mut inner = self.lock();
        inner.standing += 1;
        self.changed.notify_all();
        while self.wanted() == Wanted::Stand {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.standing -= 1;
    }

    /// Waits until every processor stands, or the gate is no longer closed.
    pub fn wait_all_standing(&self) {
        let mut inner = self.lock();
        while self.wanted() == Wanted::Stand && inner.standing < self.vcpus {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn wait_all_standing_returns_only_when_nobody_runs() {
        let gate = Arc::new(Gate::new(3));
        let running = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (gate, running) = (gate.clone(), running.clone());
                thread::spawn(move || loop {
                    match gate.wanted() {
                        Wanted::Stand => gate.stand(),
                        Wanted::Run => {
                            running.fetch_add(1, Ordering::SeqCst);
                            thread::yield_now();
                            running.fetch_sub(1, Ordering::SeqCst);
                        }
                        Wanted::Finish => return,
                    }
                })
            })
            .collect();
        for _ in 0..100 {
            gate.set(Wanted::Run);
            thread::yield_now();
            gate.set(Wanted::Stand);
            gate.wait_all_standing();
            assert_eq!(running.load(Ordering::SeqCst), 0);
        }
        gate.set(Wanted::Finish);
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn nothing_changes_after_finish() {
        let gate = Gate::new(1);
        gate.set(Wanted::Finish);
        gate.set(Wanted::Run);
        assert_eq!(gate.wanted(), Wanted::Finish);
        gate.stand();
        gate.wait_all_standing();
    }
}
