#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use records::encode::Format;

use super::*;
use crate::queue::PkgIds;

fn meta(points: u32, body: &[u8]) -> BodyMeta {
    BodyMeta {
        format: Format::Protobuf.into(),
        category: records::Category::Network,
        gzip: false,
        points,
        raw_len: body.len() as u32,
        wire_len: body.len() as u32,
        created_ms: 7,
        pkg: PkgIds::new().next(1),
    }
}

fn put(store: &Store, slot: u32, id: u64, body: &[u8]) -> Result<Vec<bool>, StoreError> {
    store.commit(&Changes {
        put: vec![(slot, id, meta(2, body), body)],
        ..Changes::default()
    })
}

#[test]
fn bodies_identities_and_removals_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let (store, aside) = Store::open(Some(dir.path())).unwrap();
    assert_eq!(aside, None);
    let (a, b) = (store.slot("a").unwrap(), store.slot("b").unwrap());
    assert_ne!(a, b);
    assert_eq!(store.slot("a").unwrap(), a);
    let key: AgentKey = ("node".into(), 9);
    let mut seen = Seen::default();
    seen.insert(4);
    let changes = Changes {
        put: vec![
            (a, 0, meta(2, b"zero"), b"zero"),
            (a, 1, meta(3, b"one"), b"one"),
            (b, 0, meta(5, b"b"), b"b"),
        ],
        seen: vec![(&key, seen.to_bytes())],
        ..Changes::default()
    };
    store.commit(&changes).unwrap();
    let remove = || Changes {
        remove: vec![(a, 0)],
        ..Changes::default()
    };
    assert_eq!(store.commit(&remove()).unwrap(), [true]);
    assert_eq!(store.commit(&remove()).unwrap(), [false]);
    drop(store);

    let (store, _) = Store::open(Some(dir.path())).unwrap();
    let backlog = store.backlog(a).unwrap();
    assert_eq!((backlog.bodies, backlog.points, backlog.next_id), (1, 3, 2));
    assert_eq!(store.body(a, 0).unwrap(), None);
    assert_eq!(store.body(a, 1).unwrap().as_deref(), Some(b"one".as_slice()));
    assert_eq!(
        store
            .waiting(a, 0, 10)
            .unwrap()
            .iter()
            .map(|(id, _)| *id)
            .collect::<Vec<_>>(),
        [1]
    );
    assert_eq!(store.agents().unwrap(), [(key, seen)]);
    assert_eq!(store.drop_sink("b", b).unwrap(), 5);
    assert_eq!(store.backlog(b).unwrap(), Backlog::default());
    assert_eq!(store.sinks().unwrap(), [("a".to_owned(), a)]);
}

#[test]
fn second_owner_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let first = Store::open(Some(dir.path())).unwrap();
    let text = Store::open(Some(dir.path())).unwrap_err().to_string();
    assert!(
        text.contains("queue.redb` is in use by another process; stop that one"),
        "{text}"
    );
    drop(first);
    Store::open(Some(dir.path())).unwrap();
}

#[test]
fn unusable_directory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    for path in [file.clone(), file.join("below"), PathBuf::from("/proc/queue-here")] {
        let text = Store::open(Some(&path)).unwrap_err().to_string();
        assert!(
            text.contains(&format!("`{}", path.display())) && text.contains("can write"),
            "{text}"
        );
    }
}

#[test]
fn damaged_file_is_moved_aside_and_a_new_one_started() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 3] = [
        ("garbage", |path| fs::write(path, vec![0x5a; 300_000]).unwrap()),
        ("cut", |path| {
            let file = fs::File::options().write(true).open(path).unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        }),
        ("short", |path| fs::write(path, b"redb").unwrap()),
    ];
    for (name, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(Some(dir.path())).unwrap();
        let slot = store.slot("a").unwrap();
        put(&store, slot, 0, &[1; 200_000]).unwrap();
        drop(store);
        let path = dir.path().join(FILE_NAME);
        damage(&path);
        let (store, aside) = Store::open(Some(dir.path())).unwrap();
        let aside = aside.unwrap_or_else(|| panic!("{name}: nothing was moved aside"));
        assert!(aside.exists(), "{name}");
        let slot = store.slot("a").unwrap();
        assert_eq!(store.backlog(slot).unwrap(), Backlog::default(), "{name}");
        put(&store, slot, 0, b"fresh").unwrap();
    }
}

#[test]
fn memory_store_needs_no_directory() {
    let (store, _) = Store::open(None).unwrap();
    let slot = store.slot("a").unwrap();
    put(&store, slot, 0, b"x").unwrap();
    assert_eq!(store.backlog(slot).unwrap().bodies, 1);
    assert_eq!(store.disk_free(), None);
}
