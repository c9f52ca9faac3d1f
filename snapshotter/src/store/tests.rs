use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("metadata.redb")).unwrap();
    (dir, store)
}

fn new(kind: Kind, key: &str, parent: &str) -> NewSnapshot {
    NewSnapshot { kind, key: key.into(), parent: parent.into(), labels: BTreeMap::new() }
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// Creates and commits a chain of snapshots called `l1`, `l2`, …
fn chain(store: &Store, length: usize) {
    let mut parent = String::new();
    for layer in 1..=length {
        store.create(&new(Kind::Active, "a", &parent), |_| Ok(())).unwrap();
        parent = format!("l{layer}");
        store.commit("a", &parent, "", BTreeMap::new(), |_, _| Ok(())).unwrap();
    }
}

#[test]
fn a_chain_is_returned_nearest_first() {
    let (_dir, store) = store();
    chain(&store, 3);

    let created = store.create(&new(Kind::Active, "top", "l3"), |_| Ok(())).unwrap();

    assert_eq!(created.parents.iter().map(|r| r.number).collect::<Vec<_>>(), [3, 2, 1]);
    assert_eq!(store.chain("top").unwrap(), created);
    assert_eq!(store.chain_of(created.record.number).unwrap(), Some(created));
}

#[test]
fn create_with_a_taken_key_returns_already_exists() {
    let (_dir, store) = store();
    chain(&store, 1);
    for (key, parent) in [("l1", ""), ("l1", "l1")] {
        let err = store.create(&new(Kind::View, key, parent), |_| Ok(())).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::AlreadyExists);
    }
}

#[test]
fn create_with_an_impossible_parent_is_refused() {
    let (_dir, store) = store();
    store.create(&new(Kind::Active, "active", ""), |_| Ok(())).unwrap();
    let missing = store.create(&new(Kind::Active, "x", "none"), |_| Ok(())).unwrap_err();
    let active = store.create(&new(Kind::Active, "x", "active"), |_| Ok(())).unwrap_err();
    assert_eq!((missing.kind(), active.kind()), (ErrorKind::NotFound, ErrorKind::Invalid));
}

#[test]
fn create_whose_directory_fails_leaves_nothing() {
    let (_dir, store) = store();
    store.create(&new(Kind::Active, "x", ""), |_| Err(Error::internal("disk full"))).unwrap_err();
    assert_eq!(store.get("x").unwrap_err().kind(), ErrorKind::NotFound);
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn remove_of_a_parent_returns_failed_precondition() {
    let (_dir, store) = store();
    chain(&store, 2);
    assert_eq!(store.remove("l1").unwrap_err().kind(), ErrorKind::Precondition);
    store.remove("l2").unwrap();
    store.remove("l1").unwrap();
    assert_eq!(store.remove("l1").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn numbers_are_never_used_twice() {
    let (_dir, store) = store();
    let first = store.create(&new(Kind::Active, "x", ""), |_| Ok(())).unwrap();
    store.remove("x").unwrap();
    let second = store.create(&new(Kind::Active, "x", ""), |_| Ok(())).unwrap();
    assert_ne!(first.record.number, second.record.number);
}

#[test]
fn commit_of_what_is_not_active_returns_failed_precondition() {
    let (_dir, store) = store();
    store.create(&new(Kind::View, "view", ""), |_| Ok(())).unwrap();
    chain(&store, 1);
    for key in ["view", "l1"] {
        let err = store.commit(key, "name", "", BTreeMap::new(), |_, _| Ok(())).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Precondition, "{key}");
    }
    let err = store.commit("none", "name", "", BTreeMap::new(), |_, _| Ok(())).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotFound);
}

#[test]
fn commit_can_give_files_a_parent_but_not_another_one() {
    let (_dir, store) = store();
    chain(&store, 2);
    store.create(&new(Kind::Active, "x", ""), |_| Ok(())).unwrap();
    let committed = store.commit("x", "y", "l2", BTreeMap::new(), |_, _| Ok(())).unwrap();
    assert_eq!(committed.parent, "l2");
    assert_eq!(store.remove("l2").unwrap_err().kind(), ErrorKind::Precondition);

    store.create(&new(Kind::Active, "x", "l1"), |_| Ok(())).unwrap();
    let err = store.commit("x", "z", "l2", BTreeMap::new(), |_, _| Ok(())).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Invalid);
}

#[test]
fn a_child_of_a_machine_belongs_to_it() {
    let (_dir, store) = store();
    store.create(&new(Kind::Active, "a", ""), |_| Ok(())).unwrap();
    let ready = Content::Machine(Layer::Ready);
    store
        .commit("a", "base", "", BTreeMap::new(), |record, _| {
            record.content = ready.clone();
            Ok(())
        })
        .unwrap();
    let child = store.create(&new(Kind::Active, "vm", "base"), |_| Ok(())).unwrap();
    assert_eq!(child.record.content, Content::Machine(Layer::Empty));
}

#[test]
fn update_follows_the_mask() {
    let (_dir, store) = store();
    let mut first = new(Kind::Active, "x", "");
    first.labels = labels(&[("a", "1"), ("b", "2")]);
    let created = store.create(&first, |_| Ok(())).unwrap().record;

    let one = store.update("x", &labels(&[("a", "9"), ("c", "3")]), &["labels.a".into(), "labels.b".into()]).unwrap();
    assert_eq!(one.labels, labels(&[("a", "9")]));
    assert!(one.updated > created.updated && one.created == created.created);

    let all = store.update("x", &labels(&[("c", "3")]), &["labels".into()]).unwrap();
    assert_eq!(all.labels, labels(&[("c", "3")]));
    let none = store.update("x", &BTreeMap::new(), &[]).unwrap();
    assert!(none.labels.is_empty());
    let err = store.update("x", &BTreeMap::new(), &["parent".into()]).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Invalid);
}

#[test]
fn blobs_are_needed_as_long_as_a_snapshot_holds_them() {
    let (_dir, store) = store();
    let number = store.create(&new(Kind::Active, "x", ""), |_| Ok(())).unwrap().record.number;
    let other = store.create(&new(Kind::Active, "y", ""), |_| Ok(())).unwrap().record.number;
    store.hold_blobs(&["sha256:aa".into()], &[number, other]).unwrap();
    let needed = |digest: &str| store.with_known(|_, needed| Ok(needed(digest))).unwrap();

    assert!(needed("sha256:aa") && !needed("sha256:bb"));
    store.remove("x").unwrap();
    assert!(needed("sha256:aa"));
    store.remove("y").unwrap();
    assert!(!needed("sha256:aa"));
    assert_eq!(store.hold_blobs(&["sha256:aa".into()], &[number]).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn everything_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.redb");
    let before = {
        let store = Store::open(&path).unwrap();
        chain(&store, 2);
        store.list().unwrap()
    };
    assert_eq!(Store::open(&path).unwrap().list().unwrap(), before);
}
