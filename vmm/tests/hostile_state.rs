//! The state of a real machine, damaged everywhere and forged everywhere: an error each time, or a machine that is as sound
//! as any. Without KVM; `restore_refusals.rs` has the same with a guest that runs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

#[allow(dead_code, reason = "each test file uses its part")]
#[path = "common/bare.rs"]
mod bare;

use bare::{file, golden, is_restored, read, seal, Bare};
use ovms_state::{Blob, Limits, StateFile, Unpack};
use ovms_vmm::vcpu::state::VcpuV1;
use serde_json::{json, Value};

const BLOBS: [(&str, &[u8]); 3] = [
    ("base", include_bytes!("golden/0.1/base")),
    ("zstd", include_bytes!("golden/0.1/zstd")),
    ("diff", include_bytes!("golden/0.1/diff")),
];

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn number(bytes: &[u8], at: usize) -> usize {
    usize::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Flips a bit of each byte in `range` of `file`, one after the other, and lets `check` look.
fn with_each_byte_flipped(file: &File, range: impl Iterator<Item = usize>, mut check: impl FnMut(usize)) {
    let good = bytes_of(file);
    for at in range {
        file.write_all_at(&[good[at] ^ 1 << (at % 8)], at as u64).unwrap();
        check(at);
        file.write_all_at(&good[at..=at], at as u64).unwrap();
    }
}

/// Does `work` for every number below `count`, on two threads.
fn for_all(count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let numbers = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
                numbers.take_while(|number| *number < count).for_each(&work);
            });
        }
    });
}

#[test]
fn state_file_with_any_byte_flipped_or_cut_anywhere_is_refused() {
    let (machine, _) = golden();
    let good = bytes_of(&machine.state);
    let state = file(&good);
    with_each_byte_flipped(&state, 0..good.len(), |at| {
        let err = read(&state, &machine.head).expect_err(&format!("byte {at} of {} was flipped", good.len()));
        assert!(err.starts_with("the state of the RAM snapshot cannot be read: "), "byte {at}: {err}");
    });
    read(&state, &machine.head).unwrap();
    state.set_len(good.len() as u64 + 1).unwrap();
    assert!(read(&state, &machine.head).is_err());
    for length in (0..good.len()).rev() {
        state.set_len(length as u64).unwrap();
        let err = read(&state, &machine.head).expect_err(&format!("{length} of {} bytes are enough", good.len()));
        assert!(err.starts_with("the state of the RAM snapshot cannot be read: "), "{length} bytes: {err}");
    }
}

#[test]
fn blob_with_any_byte_flipped_or_cut_anywhere_is_refused_or_unpacked_to_the_same() {
    for (name, good) in BLOBS {
        let blob = file(good);
        let opened = Blob::open(file(good)).unwrap();
        let (memory, names) = (opened.head().memory, vec![bare::BASE.to_owned(); 2]);
        // A diff alone is no chain; the base that it needs here is itself of no matter, for nothing of it is damaged.
        let base = || Blob::open(file(BLOBS[0].1)).unwrap();
        let unpacked = || -> Result<(File, Vec<ovms_state::Section>), String> {
            let mut blobs = vec![Blob::open(blob.try_clone().unwrap()).map_err(|err| err.to_string())?];
            if opened.head().parent.is_some() {
                blobs.push(base());
            }
            let (out, state) = (file(&[]), file(&[]));
            let names = &names[..blobs.len()];
            let plan = Unpack::plan(blobs, names, out.try_clone().unwrap(), Limits { memory });
            let plan = plan.map_err(|err| err.to_string())?;
            plan.work();
            plan.finish(&state).map_err(|err| err.to_string())?;
            Ok((out, StateFile::read(&state).map_err(|err| err.to_string())?.1))
        };
        let (whole, sections) = unpacked().unwrap();
        let whole = bytes_of(&whole);
        // Behind the chunks, each byte is looked at without decoding one of them. The sections of one blob
        // are enough.
        let head_at = number(good, 16);
        let head: Value = serde_json::from_slice(&good[head_at..]).unwrap();
        let index = head["index"]["offset"].as_u64().unwrap() as usize;
        let until = if name == "base" { head_at } else { index + head["index"]["length"].as_u64().unwrap() as usize };
        with_each_byte_flipped(&blob, (0..64).chain(index..until).chain(head_at..good.len()), |at| {
            let refused = Blob::open(blob.try_clone().unwrap()).and_then(|blob| {
                blob.sections()?;
                let mut blobs = vec![blob];
                blobs.extend(opened.head().parent.is_some().then(base));
                let names = &names[..blobs.len()];
                Unpack::plan(blobs, names, file(&[]), Limits { memory }).map(drop)
            });
            let err = refused.expect_err(&format!("{name}: byte {at} was flipped"));
            assert!(!err.to_string().is_empty());
        });
        with_each_byte_flipped(&blob, (64..index).step_by(997), |at| match unpacked() {
            Err(err) => assert!(err.contains("chunk"), "{name}: byte {at}: {err}"),
            // A frame or a block can say the same in another way.
            Ok((memory, state)) => assert!(bytes_of(&memory) == whole && state == sections, "{name}: byte {at}"),
        });
        for length in (0..good.len()).rev() {
            blob.set_len(length as u64).unwrap();
            assert!(Blob::open(blob.try_clone().unwrap()).is_err(), "{name}: {length} bytes are enough");
        }
    }
}

#[test]
fn section_with_any_byte_flipped_behind_right_checksums_is_refused_or_harmless() {
    let (machine, ram) = golden();
    let places: Vec<(usize, usize)> = (0..)
        .zip(&machine.sections)
        .flat_map(|(n, section)| (0..section.payload.len()).map(move |at| (n, at)))
        .collect();
    let restored = AtomicUsize::new(0);
    for_all(places.len(), |place| {
        let (number, at) = places[place];
        let mut sections = machine.sections.clone();
        sections[number].payload[at] ^= 1 << (at % 8);
        let section = &sections[number];
        let is_restored = match section.kind.strip_prefix("vcpu/") {
            // What a processor makes of its registers is a matter of KVM (`vcpu::state`), and no device's.
            Some(index) => VcpuV1::load(section, index.parse().unwrap())
                .and_then(|state| state.section(0))
                .is_ok_and(|again| again.payload.len() <= section.payload.len()),
            None => is_restored(&machine.head, &sections, ram),
        };
        restored.fetch_add(usize::from(is_restored), Ordering::Relaxed);
    });
    let (all, restored) = (places.len(), restored.into_inner());
    eprintln!("{all} bytes flipped, {restored} of them make another machine");
    // Registers may hold what they like; names, lengths and structure may not.
    assert!(restored > all / 10 && restored < all * 9 / 10, "{restored} of {all}");
}

#[test]
fn head_with_any_byte_flipped_behind_right_checksums_is_refused_or_harmless() {
    let (machine, ram) = golden();
    let good = bytes_of(&machine.state);
    let head = number(&good, 16);
    let mut accepted = 0;
    for at in head..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        seal(&mut bad, head);
        let state = file(&bad);
        if read(&state, &machine.head).is_err() {
            continue;
        }
        let (found, sections) = StateFile::read(&state).unwrap();
        assert_eq!((found.vcpus, found.memory), (machine.head.vcpus, machine.head.memory));
        assert!(sections.iter().map(|s| &s.payload).eq(machine.sections.iter().map(|s| &s.payload)));
        if sections != machine.sections {
            // A section of another kind or version than its part's.
            let err = Bare::new(&machine.head, ram, None).restore(&sections).expect_err(&format!("byte {at}"));
            assert!(err.contains(" part ") || err.contains("has version"), "{err}");
        }
        // What is left to say is the fingerprint, which is compared.
        let _ = found.check(&machine.head.fingerprint);
        let _ = found.fingerprint.check_machine(&machine.head.fingerprint.devices, &machine.head.fingerprint.disks);
        accepted += 1;
    }
    eprintln!("{} bytes of the head flipped, {accepted} read", good.len() - head);
    assert!(accepted > 0);
}

/// Every value in a document, by its place.
fn places(value: &Value, at: String, to: &mut Vec<String>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| places(value, format!("{at}/{name}"), to)),
        Value::Array(items) => {
            to.push(at.clone());
            items.iter().enumerate().for_each(|(n, value)| places(value, format!("{at}/{n}"), to));
        }
        _ => to.push(at),
    }
}

#[test]
fn sections_with_any_value_replaced_are_refused_or_harmless() {
    let (machine, _) = golden();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let odd = [
        json!(0),
        json!(1),
        json!(-1),
        json!(127),
        json!(255),
        json!(256),
        json!(65535),
        json!(u32::MAX),
        json!(1_u64 << 63),
        json!(u64::MAX),
        json!(1.5),
        json!(null),
        json!(true),
        json!(""),
        json!("ff"),
        json!("f".repeat(9000)),
        json!([]),
        json!([0]),
        json!(vec![255; 9000]),
        json!({}),
    ];
    let inputs: Vec<Vec<u8>> = (0..3000)
        .map(|_| {
            let choice = random(machine.sections.len());
            let payload = &machine.sections[choice].payload;
            let mut document: Value = serde_json::from_slice(payload).unwrap();
            let mut at = Vec::new();
            places(&document, String::new(), &mut at);
            for _ in 0..=random(3) {
                // One place may lie in what was replaced before.
                if let Some(place) = document.pointer_mut(&at[random(at.len())]) {
                    *place = odd[random(odd.len())].clone();
                }
            }
            let mut payload = serde_json::to_vec(&document).unwrap();
            if random(10) == 0 {
                let length = random(payload.len() + 1);
                payload.truncate(length);
            }
            [vec![choice as u8], payload].concat()
        })
        .collect();
    let restored = AtomicUsize::new(0);
    for_all(inputs.len(), |number| {
        restored.fetch_add(usize::from(bare::section(&inputs[number])), Ordering::Relaxed);
    });
    let restored = restored.into_inner();
    eprintln!("{restored} of {} sections make another machine", inputs.len());
    assert!(restored > 0 && restored < inputs.len());
}

#[test]
fn sections_of_each_other_are_refused() {
    let (machine, _) = golden();
    for (choice, section) in machine.sections.iter().enumerate() {
        assert!(bare::section(&[&[choice as u8], &section.payload[..]].concat()), "{}", section.kind);
        let other = &machine.sections[(choice + 1) % machine.sections.len()];
        // Two processors may well have each other's state, and a unit is one for any device.
        if section.kind.split('/').next() != other.kind.split('/').next() {
            assert!(
                !bare::section(&[&[choice as u8], &other.payload[..]].concat()),
                "{} as {}",
                other.kind,
                section.kind
            );
        }
    }
}
