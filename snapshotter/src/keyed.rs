//! Locks by name: work on one thing happens once at a time, work on different things does not wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

/// A lock for each name.
#[derive(Debug, Default)]
pub struct Keyed(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Keyed {
    /// Waits until nobody else holds this name.
    pub async fn lock(&self, name: String) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // Whoever holds or awaits a lock has a copy of it.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(name).or_default())
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_name_is_held_once_and_forgotten_afterwards() {
        let keyed = Keyed::default();
        let held = keyed.lock("a".into()).await;
        let _other = keyed.lock("b".into()).await;
        let again = tokio::time::timeout(std::time::Duration::from_millis(20), keyed.lock("a".into())).await;
        assert!(again.is_err());
        drop(held);
        let _again = keyed.lock("a".into()).await;
        assert_eq!(keyed.0.lock().unwrap().len(), 2);
    }
}
