//! RFC 7541, appendix C, complete; what cannot be known; errors. Real encoders are in `tests/protocols`.

use proptest::prelude::*;

use super::{Decoder, Field, HpackError, Scratch, integer};

fn hex(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    digits
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn all(_: &[u8]) -> bool {
    true
}

fn none(_: &[u8]) -> bool {
    false
}

/// Headers of a block as `name: value`, `?` for those that are not known.
fn decode(decoder: &mut Decoder, block: &[u8]) -> Result<Vec<String>, HpackError> {
    let mut fields = Vec::new();
    let mut scratch = Scratch::default();
    decoder.decode(block, &mut scratch, &mut |field| {
        fields.push(match field {
            Field::Known(name, value) => {
                format!("{}: {}", String::from_utf8_lossy(name), String::from_utf8_lossy(value))
            }
            Field::Unknown => "?".to_owned(),
        });
    })?;
    Ok(fields)
}

#[test]
fn c1_integers() {
    let read = |bytes: &[u8], bits| {
        let mut input = bytes;
        integer(&mut input, bits).map(|value| (value, input.len()))
    };
    assert_eq!(read(&[0x0a], 5), Ok((10, 0)));
    assert_eq!(read(&[0x1f, 0x9a, 0x0a], 5), Ok((1337, 0)));
    assert_eq!(read(&[0x2a], 8), Ok((42, 0)));
    assert_eq!(read(&[0x1f, 0x9a], 5), Err(HpackError::Cut));
    assert_eq!(
        read(&[0xff, 0x80, 0x80, 0x80, 0x80, 0x01], 7),
        Err(HpackError::Malformed)
    );
    assert_eq!(
        read(&[0xff, 0xff, 0xff, 0xff, 0x7f, 0x00], 7),
        Ok((0x0fff_ffff + 127, 1))
    );
}

#[test]
fn c2_fields() {
    let mut decoder = Decoder::new(true, all);
    let block = hex("400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572");
    assert_eq!(decode(&mut decoder, &block).unwrap(), ["custom-key: custom-header"]);
    assert_eq!(decoder.table.size(), 55);
    let mut decoder = Decoder::new(true, all);
    assert_eq!(
        decode(&mut decoder, &hex("040c 2f73 616d 706c 652f 7061 7468")).unwrap(),
        [":path: /sample/path"]
    );
    let block = hex("1008 7061 7373 776f 7264 0673 6563 7265 74");
    assert_eq!(decode(&mut decoder, &block).unwrap(), ["password: secret"]);
    assert_eq!(decode(&mut decoder, &hex("82")).unwrap(), [":method: GET"]);
    assert_eq!(decoder.table.size(), 0);
}

/// Blocks in turn, with the headers of each and the size of the table after it.
fn blocks(mut decoder: Decoder, blocks: [(&str, &[&str], u32); 3]) {
    for (number, (block, fields, size)) in blocks.into_iter().enumerate() {
        assert_eq!(
            decode(&mut decoder, &hex(block)).unwrap(),
            fields,
            "block {}",
            number + 1
        );
        assert_eq!(decoder.table.size(), size, "after block {}", number + 1);
    }
}

const REQUESTS: [&[&str]; 3] = [
    &[
        ":method: GET",
        ":scheme: http",
        ":path: /",
        ":authority: www.example.com",
    ],
    &[
        ":method: GET",
        ":scheme: http",
        ":path: /",
        ":authority: www.example.com",
        "cache-control: no-cache",
    ],
    &[
        ":method: GET",
        ":scheme: https",
        ":path: /index.html",
        ":authority: www.example.com",
        "custom-key: custom-value",
    ],
];

#[test]
fn c3_requests_without_huffman() {
    blocks(
        Decoder::new(true, all),
        [
            ("8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d", REQUESTS[0], 57),
            ("8286 84be 5808 6e6f 2d63 6163 6865", REQUESTS[1], 110),
            (
                "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
                REQUESTS[2],
                164,
            ),
        ],
    );
}

#[test]
fn c4_requests_with_huffman() {
    blocks(
        Decoder::new(true, all),
        [
            ("8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff", REQUESTS[0], 57),
            ("8286 84be 5886 a8eb 1064 9cbf", REQUESTS[1], 110),
            (
                "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
                REQUESTS[2],
                164,
            ),
        ],
    );
}

const RESPONSES: [&[&str]; 3] = [
    &[
        ":status: 302",
        "cache-control: private",
        "date: Mon, 21 Oct 2013 20:13:21 GMT",
        "location: https://www.example.com",
    ],
    &[
        ":status: 307",
        "cache-control: private",
        "date: Mon, 21 Oct 2013 20:13:21 GMT",
        "location: https://www.example.com",
    ],
    &[
        ":status: 200",
        "cache-control: private",
        "date: Mon, 21 Oct 2013 20:13:22 GMT",
        "location: https://www.example.com",
        "content-encoding: gzip",
        "set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
    ],
];

/// A decoder of which the table has 256 bytes, as the examples have it.
fn small() -> Decoder {
    let mut decoder = Decoder::new(true, all);
    assert!(decode(&mut decoder, &hex("3fe1 01")).unwrap().is_empty());
    decoder
}

#[test]
fn c5_responses_without_huffman() {
    blocks(
        small(),
        [
            (
                "4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32
             3120 474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
                RESPONSES[0],
                222,
            ),
            ("4803 3330 37c1 c0bf", RESPONSES[1], 222),
            (
                "88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d 54c0 5a04 677a 6970
             7738 666f 6f3d 4153 444a 4b48 514b 425a 584f 5157 454f 5049 5541 5851 5745 4f49 553b 206d 6178 2d61
             6765 3d33 3630 303b 2076 6572 7369 6f6e 3d31",
                RESPONSES[2],
                215,
            ),
        ],
    );
}

#[test]
fn c6_responses_with_huffman() {
    blocks(
        small(),
        [
            (
                "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad
             1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
                RESPONSES[0],
                222,
            ),
            ("4883 640e ffc1 c0bf", RESPONSES[1], 222),
            (
                "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2
             e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
                RESPONSES[2],
                215,
            ),
        ],
    );
}

#[test]
fn what_is_of_no_interest_takes_its_place_all_the_same() {
    let mut decoder = Decoder::new(true, |name| name == b":authority");
    let block = hex("8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d");
    assert_eq!(decode(&mut decoder, &block).unwrap(), [":authority: www.example.com"]);
    // cache-control and custom-key push :authority to 64; then a literal with the name of custom-key (62).
    decode(
        &mut decoder,
        &hex("5808 6e6f 2d63 6163 6865 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65"),
    )
    .unwrap();
    assert_eq!(
        decode(&mut decoder, &hex("c0")).unwrap(),
        [":authority: www.example.com"]
    );
    assert_eq!(decoder.table.size(), 164);
    decode(&mut decoder, &hex("7e 01 78")).unwrap();
    assert_eq!(decoder.table.size(), 164 + 32 + 10 + 1);
    let mut decoder = Decoder::new(true, none);
    assert!(decode(&mut decoder, &block).unwrap().is_empty());
    assert_eq!(decoder.table.size(), 57);
}

#[test]
fn a_decoder_that_came_later_resolves_only_what_it_saw() {
    let mut decoder = Decoder::new(false, all);
    // 62 was added before we came.
    assert_eq!(decode(&mut decoder, &hex("82be")).unwrap(), [":method: GET", "?"]);
    // A literal named by an unknown entry, added: then it is the newest, and as unknown.
    assert_eq!(decode(&mut decoder, &hex("7e 01 78")).unwrap(), ["?"]);
    assert_eq!(decode(&mut decoder, &hex("be")).unwrap(), ["?"]);
    // One that is seen whole is known, and stays so when others are added.
    decode(&mut decoder, &hex("4401 2f")).unwrap();
    assert_eq!(decode(&mut decoder, &hex("be bf c0")).unwrap(), [":path: /", "?", "?"]);
    decode(&mut decoder, &hex("4402 2f61")).unwrap();
    assert_eq!(
        decode(&mut decoder, &hex("be bf c0 c1")).unwrap(),
        [":path: /a", ":path: /", "?", "?"]
    );
    // Blocks that were missed may have added entries.
    decoder.forget();
    assert_eq!(decode(&mut decoder, &hex("be bf")).unwrap(), ["?", "?"]);
    // An emptied table is known again: a reference beyond its end is an error.
    assert!(decode(&mut decoder, &hex("20 3fe1 01")).unwrap().is_empty());
    assert_eq!(decode(&mut decoder, &hex("be")), Err(HpackError::Malformed));
}

#[test]
fn a_cut_block_gives_what_came_before_the_cut_and_voids_the_table() {
    let mut decoder = Decoder::new(true, all);
    decode(&mut decoder, &hex("4401 2f")).unwrap();
    let mut fields = 0;
    let mut scratch = Scratch::default();
    let cut = hex("82 be 4008 6162");
    assert_eq!(
        decoder.decode(&cut, &mut scratch, &mut |_| fields += 1),
        Err(HpackError::Cut)
    );
    assert_eq!(fields, 2);
    assert_eq!(decode(&mut decoder, &hex("be")).unwrap(), ["?"]);
}

#[test]
fn errors() {
    for (block, why) in [
        ("80", "index 0"),
        ("c6", "beyond the table"),
        ("82 20", "a size update after a field"),
        ("7e 01 78", "a name beyond the table"),
        ("4401 2f ff 80 80 80 80 01", "a number without end"),
        ("44 81 00", "padding that is not EOS"),
    ] {
        let mut decoder = Decoder::new(true, all);
        assert_eq!(decode(&mut decoder, &hex(block)), Err(HpackError::Malformed), "{why}");
    }
}

#[test]
fn a_table_that_is_asked_to_be_huge_is_not() {
    let mut decoder = Decoder::new(true, all);
    // 2^28 bytes, then entries of 4 KiB each.
    decode(&mut decoder, &hex("3f e1 ff ff 7f")).unwrap();
    let entry = [&[0x44, 0x7f, 0xe1, 0x1e][..], &[b'x'; 4064]].concat();
    for _ in 0..1000 {
        decode(&mut decoder, &entry).unwrap();
    }
    assert!(decoder.table.size() <= 65536);
    // What was dropped for that is unknown, not wrong.
    assert_eq!(decode(&mut decoder, &hex("ff 41")).unwrap(), ["?"]);
}

proptest! {
    #[test]
    fn any_block(complete in any::<bool>(), blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20)) {
        let mut decoder = Decoder::new(complete, all);
        for block in blocks {
            let _ = decode(&mut decoder, &block);
            prop_assert!(decoder.table.size() <= 65536);
        }
    }
}
