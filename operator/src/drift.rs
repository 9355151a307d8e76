//! Whether a live object still is what was applied: then nothing is written.
//!
//! An object carries the hash of what was applied ([`crate::names::APPLIED_HASH`]). [`is_current`] asks for the same hash,
//! and that every field that we set has our value: what the API server or others added besides is theirs.

use serde_json::{Map, Value};

use crate::names::APPLIED_HASH;

/// Lists that the API server merges by a key: others may add elements to them.
const MERGED: [&str; 9] = [
    "containers",
    "env",
    "imagePullSecrets",
    "initContainers",
    "ownerReferences",
    "ports",
    "secrets",
    "volumeMounts",
    "volumes",
];
/// Parents of quantities, which the API server writes in its own way (`1024Mi` becomes `1Gi`).
const QUANTITIES: [&str; 4] = ["capacity", "limits", "requests", "sizeLimit"];

/// The object with the annotation that [`is_current`] looks for.
#[must_use]
pub fn with_hash(mut object: Value) -> Value {
    let hash = hash(&object);
    let mut place = &mut object;
    for key in ["metadata", "annotations"] {
        if !place.get(key).is_some_and(Value::is_object)
            && let Value::Object(map) = &mut *place
        {
            map.insert(key.to_owned(), Value::Object(Map::new()));
        }
        match place.get_mut(key) {
            Some(next) => place = next,
            // Only what is no JSON object gets here, and such is no Kubernetes object.
            None => return object,
        }
    }
    if let Value::Object(annotations) = place {
        annotations.insert(APPLIED_HASH.to_owned(), Value::String(hash));
    }
    object
}

/// The hash that [`with_hash`] put into an object, if it did.
#[must_use]
pub fn applied_hash(object: &Value) -> Option<&str> {
    object.get("metadata")?.get("annotations")?.get(APPLIED_HASH)?.as_str()
}

/// Whether `live` holds all of `desired`, which [`with_hash`] made. The reason, when not: the path of the first field.
///
/// # Errors
/// The path of the first field that differs.
pub fn is_current(desired: &Value, live: &Value) -> Result<(), String> {
    contains(desired, live, "", "")
}

/// SHA-256 of the JSON with sorted keys, in hexadecimal.
#[must_use]
pub fn hash(value: &Value) -> String {
    // serde_json's maps are sorted.
    let digest = ring::digest::digest(&ring::digest::SHA256, value.to_string().as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn contains(desired: &Value, live: &Value, path: &str, key: &str) -> Result<(), String> {
    let differs = || Err(path.to_owned());
    match (desired, live) {
        (Value::Object(desired), Value::Object(live)) => desired.iter().try_for_each(|(name, value)| {
            let path = format!("{path}.{name}");
            let key = if QUANTITIES.contains(&key) { key } else { name.as_str() };
            match live.get(name) {
                Some(live) => contains(value, live, &path, key),
                None => Err(path),
            }
        }),
        // A network policy's ports are one value; nobody else may add to them.
        (Value::Array(desired), Value::Array(live)) if MERGED.contains(&key) && !path.starts_with(".spec.ingress") => {
            desired.iter().enumerate().try_for_each(|(index, element)| {
                let path = format!("{path}[{index}]");
                // The reason of the element with the same name, if there is one, says more than "missing".
                let same = |other: &&Value| other.get("name").is_some() && other.get("name") == element.get("name");
                let of_same_name = live.iter().find(same).map(|other| contains(element, other, &path, ""));
                match of_same_name {
                    Some(Ok(())) => Ok(()),
                    _ if live.iter().any(|other| contains(element, other, &path, "").is_ok()) => Ok(()),
                    Some(reason) => reason,
                    None => Err(path),
                }
            })
        }
        (Value::Array(desired), Value::Array(live)) => {
            if desired.len() != live.len() {
                return differs();
            }
            let mut pairs = desired.iter().zip(live).enumerate();
            pairs.try_for_each(|(index, (desired, live))| contains(desired, live, &format!("{path}[{index}]"), ""))
        }
        (Value::String(desired), Value::String(live)) if QUANTITIES.contains(&key) && desired != live => {
            match (quantity(desired), quantity(live)) {
                (Some(desired), Some(live)) if desired == live => Ok(()),
                _ => differs(),
            }
        }
        _ if desired == live => Ok(()),
        _ => differs(),
    }
}

/// A quantity in thousandths.
fn quantity(text: &str) -> Option<i128> {
    let digits = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    let factor: i128 = match unit {
        "m" => 1,
        "" => 1_000,
        "k" => 1_000_000,
        "M" => 1_000_000_000,
        "G" => 1_000_000_000_000,
        "T" => 1_000_000_000_000_000,
        "Ki" => 1_000 << 10,
        "Mi" => 1_000 << 20,
        "Gi" => 1_000 << 30,
        "Ti" => 1_000 << 40,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let mut value = whole.parse::<i128>().ok()?.checked_mul(factor)?;
    let mut place = factor;
    for digit in fraction.chars() {
        place /= 10;
        value += i128::from(digit.to_digit(10)?) * place;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use serde_json::json;

    use super::*;

    fn desired() -> Value {
        with_hash(json!({
            "metadata": { "name": "a", "labels": { "x": "1" } },
            "spec": {
                "containers": [{
                    "name": "agent",
                    "env": [{ "name": "A", "value": "1" }],
                    "resources": { "limits": { "memory": "1024Mi", "cpu": "0.5" } },
                    "capabilities": { "add": ["BPF", "PERFMON"] },
                }],
                "rules": [{ "verbs": ["get"] }],
            },
        }))
    }

    /// As an API server answers: with defaults, foreign labels and fields, quantities in its own form.
    fn live() -> Value {
        let mut live = desired();
        live["metadata"]["uid"] = json!("u");
        live["metadata"]["labels"]["foreign"] = json!("2");
        live["spec"]["containers"][0]["terminationMessagePath"] = json!("/dev/termination-log");
        live["spec"]["containers"][0]["resources"]["limits"] = json!({ "memory": "1Gi", "cpu": "500m" });
        live["spec"]["containers"][0]["env"]
            .as_array_mut()
            .unwrap()
            .insert(0, json!({ "name": "B" }));
        live["spec"]["containers"]
            .as_array_mut()
            .unwrap()
            .insert(0, json!({ "name": "sidecar" }));
        live["status"] = json!({});
        live
    }

    #[test]
    fn what_others_add_is_no_drift() {
        assert_eq!(is_current(&desired(), &live()), Ok(()));
    }

    #[test]
    fn each_change_of_ours_is_seen_by_its_path() {
        type Change = fn(&mut Value);
        let changes: [(Change, &str); 8] = [
            (|l| l["metadata"]["labels"]["x"] = json!("2"), ".metadata.labels.x"),
            (
                |l| l["spec"]["containers"][1]["env"] = json!([]),
                ".spec.containers[0].env[0]",
            ),
            (
                |l| l["spec"]["containers"][1]["resources"]["limits"]["memory"] = json!("2Gi"),
                ".spec.containers[0].resources.limits.memory",
            ),
            (
                |l| l["spec"]["containers"][1]["capabilities"]["add"] = json!(["BPF", "PERFMON", "SYS_ADMIN"]),
                ".spec.containers[0].capabilities.add",
            ),
            (
                |l| l["spec"]["rules"][0]["verbs"] = json!(["*"]),
                ".spec.rules[0].verbs[0]",
            ),
            (
                |l| {
                    l["spec"]["rules"]
                        .as_array_mut()
                        .unwrap()
                        .push(json!({ "verbs": ["*"] }))
                },
                ".spec.rules",
            ),
            (|l| l["spec"]["containers"] = json!([]), ".spec.containers[0]"),
            (
                |l| l["metadata"]["annotations"][APPLIED_HASH] = json!("old"),
                ".metadata.annotations.ebpfcollector.io/applied-hash",
            ),
        ];
        for (change, path) in changes {
            let mut live = live();
            change(&mut live);
            assert_eq!(is_current(&desired(), &live), Err(path.to_owned()));
        }
    }

    #[test]
    fn a_field_that_is_no_longer_wanted_changes_the_hash() {
        let mut less = desired();
        less["metadata"].as_object_mut().unwrap().remove("annotations");
        less["spec"]["containers"][0].as_object_mut().unwrap().remove("env");
        assert!(is_current(&with_hash(less), &live()).is_err());
    }

    #[test]
    fn quantities_compare_by_value() {
        for (a, b) in [
            ("1024Mi", "1Gi"),
            ("0.5", "500m"),
            ("1.5Gi", "1536Mi"),
            ("2", "2000m"),
            ("1k", "1000"),
        ] {
            assert_eq!(quantity(a).unwrap(), quantity(b).unwrap(), "{a} {b}");
        }
        assert_ne!(quantity("1G"), quantity("1Gi"));
        assert_eq!(quantity("1e3"), None);
    }
}
