//! Has a file written back while it is being filled. The kernel begins only when much is changed in memory, and the sync at
//! the end would wait for all of it: on a disk that is slower than lz4 a snapshot would take the time of both.

use std::fs::File;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::sys::begin_writeback;

/// How often what was written since goes to the disk.
const TICK: Duration = Duration::from_millis(50);

/// Goes on until it is dropped, which does not wait for the disk.
pub(super) struct Writeback {
    _going: mpsc::Sender<()>,
}

impl Writeback {
    /// Begins. Where that is impossible the sync at the end has more to do, and nothing else differs.
    pub(super) fn of(file: &File) -> Self {
        let (going, over) = mpsc::channel();
        let begun = file.try_clone().and_then(|file| {
            let work = move || {
                while over.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) && begin_writeback(&file).is_ok() {}
            };
            thread::Builder::new().name("writeback".into()).spawn(work)
        });
        if let Err(err) = begun {
            tracing::debug!(%err, "a snapshot is written back only at its end");
        }
        Self { _going: going }
    }
}
