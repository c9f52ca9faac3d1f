use std::io::{Cursor, Read};

use super::*;

/// A header with a right checksum.
fn header(name: &str, kind: u8, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_size(size);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn member(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, kind, content.len() as u64);
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn archive(members: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = members.concat();
    bytes.extend_from_slice(&[0; 1024]);
    bytes
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut content = Vec::new();
    for (key, value) in records {
        let body = format!(" {key}={value}\n");
        let mut length = body.len() + 1;
        while format!("{length}{body}").len() != length {
            length = format!("{length}{body}").len();
        }
        content.extend_from_slice(format!("{length}{body}").as_bytes());
    }
    member("PaxHeaders.0/x", b'x', &content)
}

fn walk(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, ArchiveError> {
    let mut walker = Walker::new(bytes);
    let mut found = Vec::new();
    while let Some(member) = walker.next()? {
        let mut content = Vec::new();
        walker.content().read_to_end(&mut content)?;
        found.push((member.path, content));
    }
    Ok(found)
}

#[test]
fn members_come_with_normalised_names_and_contents() {
    let bytes = archive(&[member("./ovm/", b'5', b""), member("./ovm//a", b'0', b"hello"), member("b", 0, &[7; 513])]);

    let found = walk(&bytes).unwrap();

    assert_eq!(found[0].0, "ovm");
    assert_eq!(found[1], ("ovm/a".to_owned(), b"hello".to_vec()));
    assert_eq!(found[2].1, [7; 513]);
}

#[test]
fn unread_content_is_skipped_by_reading_and_by_seeking() {
    let bytes = archive(&[member("a", b'0', &[1; 5000]), member("b", b'0', b"end")]);
    let names = |next: &mut dyn FnMut() -> Option<Member>| {
        std::iter::from_fn(next).map(|m| (m.path, m.offset)).collect::<Vec<_>>()
    };
    let mut read = Walker::new(bytes.as_slice());
    let mut seek = Walker::seeking(Cursor::new(bytes.as_slice()));

    let by_reading = names(&mut || read.next().unwrap());
    let by_seeking = names(&mut || seek.next().unwrap());

    assert_eq!(by_reading, [("a".to_owned(), 512), ("b".to_owned(), 512 + 5120 + 512)]);
    assert_eq!(by_reading, by_seeking);
}

#[test]
fn pax_path_and_size_win_over_the_header() {
    let long = format!("ovm/{}", "n".repeat(200));
    let mut big = header("short", b'0', 0);
    big.extend_from_slice(&[9; 512]);
    let bytes = archive(&[pax(&[("path", &long), ("size", "512"), ("mtime", "1.5")]), big]);

    assert_eq!(walk(&bytes).unwrap(), [(long, vec![9; 512])]);
}

#[test]
fn gnu_long_name_wins_over_the_header() {
    let long = format!("{}\0", "n".repeat(150));
    let bytes = archive(&[member("././@LongLink", b'L', long.as_bytes()), member("short", b'0', b"x")]);

    assert_eq!(walk(&bytes).unwrap()[0].0, "n".repeat(150));
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["/etc/passwd", "../x", "ovm/../../x", "a\tb"] {
        assert!(matches!(walk(&archive(&[member(name, b'0', b"")])), Err(ArchiveError::Path(_))), "{name}");
    }
    let deep = "a/".repeat(40) + "b";
    assert!(matches!(walk(&archive(&[member(&deep, b'0', b"")])), Err(ArchiveError::Path(_))));
    let hidden = archive(&[pax(&[("path", "../../etc/cron.d/x")]), member("fine", b'0', b"")]);
    assert!(matches!(walk(&hidden), Err(ArchiveError::Path(_))));
}

#[test]
fn a_name_that_comes_twice_is_refused() {
    let bytes = archive(&[member("ovm/a", b'0', b"1"), member("./ovm/a", b'0', b"2")]);
    assert!(matches!(walk(&bytes), Err(ArchiveError::Duplicate(name)) if name == "ovm/a"));
}

#[test]
fn links_and_devices_are_named_as_what_they_are() {
    for (kind, name) in [(b'1', "hard link"), (b'2', "symbolic link"), (b'3', "special file"), (b'S', "sparse file")] {
        let bytes = archive(&[member("x", kind, b"")]);
        let member = Walker::new(bytes.as_slice()).next().unwrap().unwrap();
        assert_eq!(member.kind, MemberKind::Special(name));
    }
}

#[test]
fn records_of_any_claimed_length_are_capped() {
    for kind in [b'L', b'K', b'x', b'g'] {
        let bytes = header("x", kind, 1 << 33);
        assert!(matches!(walk(&bytes), Err(ArchiveError::TooMany(_))), "{}", kind as char);
    }
}

#[test]
fn damaged_pax_records_are_refused() {
    for content in [&b"99 path=x\n"[..], b"path=x\n", b"9 path=x", b"11 size=-1\n", b"18446744073709551616 a=b\n"] {
        let bytes = archive(&[member("x", b'x', content), member("y", b'0', b"")]);
        assert!(matches!(walk(&bytes), Err(ArchiveError::Damaged(_))), "{content:?}");
    }
}

#[test]
fn what_is_no_archive_is_told_from_a_damaged_one() {
    assert!(matches!(walk(b""), Err(ArchiveError::NotTar)));
    assert!(matches!(walk(&[0; 2048]), Err(ArchiveError::NotTar)));
    assert!(matches!(walk(&[b'Q'; 2048]), Err(ArchiveError::NotTar)));
    let mut bytes = archive(&[member("a", b'0', b"1"), member("b", b'0', b"2")]);
    bytes[1024] ^= 1;
    assert!(matches!(walk(&bytes), Err(ArchiveError::Damaged(1024))));
}

#[test]
fn a_cut_archive_is_refused() {
    let bytes = archive(&[member("a", b'0', &[1; 600])]);
    for length in [513, 1000, 1536, 1600] {
        assert!(walk(&bytes[..length]).is_err(), "{length}");
    }
}

proptest::proptest! {
    /// One flipped byte anywhere in an archive is walked over or refused, never more.
    #[test]
    fn a_changed_byte_never_panics(at in 0usize..4096, value in proptest::num::u8::ANY) {
        let mut bytes = archive(&[pax(&[("path", "ovm/long"), ("size", "5")]), member("ovm/x", b'0', b"hello"), member("y", b'0', b"z")]);
        let at = at % bytes.len();
        bytes[at] = value;
        let _ = walk(&bytes);
    }
}
