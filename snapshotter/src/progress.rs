//! How far long work is, for those who wait for it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ovms_bundle::worker::Progress;

/// What is being worked on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// The layer of the snapshot with this number.
    Layer(u64),
    /// The RAM snapshot with this digest, in hexadecimal digits.
    Ram(String),
}

/// The work under way.
#[derive(Debug, Default)]
pub struct Conversions(Mutex<HashMap<Work, Progress>>);

impl Conversions {
    /// Notes how far one is.
    pub fn note(&self, work: &Work, step: Progress) {
        self.all().insert(work.clone(), step);
    }

    /// One has ended.
    pub fn forget(&self, work: &Work) {
        self.all().remove(work);
    }

    /// What a waiting client is told.
    pub fn sentence(&self, work: &Work) -> String {
        let what = match work {
            Work::Layer(_) => "converting a disk layer",
            Work::Ram(_) => "unpacking a RAM snapshot",
        };
        match self.all().get(work) {
            Some(Progress { done, total }) if *total > 0 => {
                format!("{what}: {} of {} MiB", done >> 20, total >> 20)
            }
            _ => what.to_owned(),
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Work, Progress>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentence_says_what_is_known() {
        let conversions = Conversions::default();
        let (layer, ram) = (Work::Layer(1), Work::Ram("00".into()));
        assert_eq!(conversions.sentence(&layer), "converting a disk layer");
        conversions.note(&layer, Progress { done: 3 << 20, total: 8 << 20 });
        assert_eq!(conversions.sentence(&layer), "converting a disk layer: 3 of 8 MiB");
        assert_eq!(conversions.sentence(&ram), "unpacking a RAM snapshot");
        conversions.forget(&layer);
        assert_eq!(conversions.sentence(&layer), "converting a disk layer");
    }
}
