//! A thread and the workers that it serves.

use std::io;
use std::os::fd::AsRawFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::handle::{Bell, Control, Joined, Worker};
use super::seat::Seat;
use super::QueueWorker;
use crate::poll::{wait_fds, Interest};
use crate::sync::lock;
use crate::threads::{Spawner, ThreadKind};

/// A thread for the workers of one or several devices, in the making: devices take their seats, then it is started.
///
/// Dropped instead, it leaves devices that no driver can activate.
pub struct WorkerThread {
    bell: Arc<Bell>,
    seats: Vec<Seat>,
    joined: Arc<Joined>,
}

impl WorkerThread {
    /// A thread without devices.
    ///
    /// # Errors
    /// The system has no eventfd to give.
    pub fn new() -> io::Result<Self> {
        Ok(Self { bell: Arc::new(Bell::new()?), seats: Vec::new(), joined: Arc::default() })
    }

    pub(crate) fn add(&mut self, work: impl QueueWorker) -> Worker {
        let control = Arc::new(Control::new());
        self.seats.push(Seat::new(work, Arc::clone(&control)));
        Worker { control, bell: Arc::clone(&self.bell), calls: Mutex::new(()), _thread: Arc::clone(&self.joined) }
    }

    /// Starts the thread; it ends with the last of its devices.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn spawn(self, spawner: &Spawner, kind: ThreadKind, name: &str) -> io::Result<()> {
        let Self { bell, seats, joined } = self;
        seats.iter().for_each(Seat::begin);
        let thread = spawner.spawn(kind, name, move || run(&bell, seats))?;
        *lock(&joined.0) = Some(thread);
        Ok(())
    }
}

fn run(bell: &Bell, mut seats: Vec<Seat>) {
    loop {
        if bell.answer() {
            each(&mut seats, Seat::obey);
        }
        if seats.is_empty() {
            return;
        }
        let Ok(now) = wait(bell, &mut seats) else { return };
        each(&mut seats, |seat| {
            seat.serve(now, &bell.hurry);
            true
        });
    }
}

/// Keeps the seats for which `turn` says so. One whose work panics goes, and the others stay.
fn each(seats: &mut Vec<Seat>, mut turn: impl FnMut(&mut Seat) -> bool) {
    seats.retain_mut(|seat| catch_unwind(AssertUnwindSafe(|| turn(seat))).unwrap_or(false));
}

/// Waits for the bell or what wakes a seat, or until one is due; returns when that was.
pub(super) fn wait(bell: &Bell, seats: &mut [Seat]) -> io::Result<Instant> {
    let wake: &dyn AsRawFd = &bell.wake;
    let descriptors = seats.iter().flat_map(Seat::descriptors);
    let fds: Vec<_> = std::iter::once(wake).chain(descriptors).map(|fd| (fd, Interest::Read)).collect();
    let patience = seats.iter().filter_map(Seat::patience).min();
    let mut ready = wait_fds(&fds, patience)?.into_iter();
    if ready.next() == Some(true) {
        let _ = bell.wake.read();
    }
    let now = Instant::now();
    for seat in seats {
        seat.note(&mut ready, now);
    }
    Ok(now)
}
