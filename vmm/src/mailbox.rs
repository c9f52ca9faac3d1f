//! What vCPU threads and devices tell the owner thread: a queue with an eventfd, so that the owner can wait for it
//! and for the control socket at once.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc;
use std::sync::Arc;

use ovms_proto::control::ExitReason;
use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use crate::snapshot::Notice;

/// A message to the owner.
#[derive(Debug, PartialEq, Eq)]
pub enum Mail {
    /// The guest left to the VMM for the first time.
    FirstExit,
    /// What the guest of a restored machine touched first is written down.
    WorkingSetRecorded,
    /// The machine is over. Only the first counts.
    Exit(ExitReason),
    /// How the snapshot that is being taken comes along.
    Snapshot(Notice),
}

/// Sends mail; clones share the box.
#[derive(Clone)]
pub struct Sender {
    queue: mpsc::Sender<Mail>,
    signal: Arc<EventFd>,
}

impl Sender {
    /// Puts `mail` into the box. Never blocks; mail to an owner who is gone is lost.
    pub fn send(&self, mail: Mail) {
        if self.queue.send(mail).is_ok() {
            let _ = self.signal.write(1);
        }
    }
}

/// The owner's end.
pub struct Mailbox {
    queue: mpsc::Receiver<Mail>,
    signal: Arc<EventFd>,
}

impl Mailbox {
    /// An empty box.
    ///
    /// # Errors
    /// The system has no eventfd to give.
    pub fn new() -> io::Result<(Sender, Self)> {
        let signal = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (sender, queue) = mpsc::channel();
        Ok((Sender { queue: sender, signal: signal.clone() }, Self { queue, signal }))
    }

    /// Takes what has come.
    pub fn take(&self) -> Vec<Mail> {
        let _ = self.signal.read();
        self.queue.try_iter().collect()
    }
}

impl AsRawFd for Mailbox {
    /// Readable while there is mail.
    fn as_raw_fd(&self) -> RawFd {
        self.signal.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mail_arrives_in_order() {
        let (sender, mailbox) = Mailbox::new().unwrap();
        assert!(mailbox.take().is_empty());
        sender.send(Mail::FirstExit);
        sender.send(Mail::Exit(ExitReason::PowerOff));
        assert_eq!(mailbox.take(), [Mail::FirstExit, Mail::Exit(ExitReason::PowerOff)]);
    }
}
