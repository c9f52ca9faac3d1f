//! How far the conversions are, for those who wait for them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ovms_bundle::worker::Progress;

/// The conversions under way, by the number of their snapshot.
#[derive(Debug, Default)]
pub struct Conversions(Mutex<HashMap<u64, Progress>>);

impl Conversions {
    /// Notes how far one is.
    pub fn note(&self, number: u64, step: Progress) {
        self.all().insert(number, step);
    }

    /// One has ended.
    pub fn forget(&self, number: u64) {
        self.all().remove(&number);
    }

    /// What a waiting client is told.
    pub fn sentence(&self, number: u64) -> String {
        match self.all().get(&number) {
            Some(Progress { done, total }) if *total > 0 => {
                format!("converting a disk layer: {} of {} MiB", done >> 20, total >> 20)
            }
            _ => "converting a disk layer".to_owned(),
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<u64, Progress>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentence_says_what_is_known() {
        let conversions = Conversions::default();
        assert_eq!(conversions.sentence(1), "converting a disk layer");
        conversions.note(1, Progress { done: 3 << 20, total: 8 << 20 });
        assert_eq!(conversions.sentence(1), "converting a disk layer: 3 of 8 MiB");
        conversions.forget(1);
        assert_eq!(conversions.sentence(1), "converting a disk layer");
    }
}
