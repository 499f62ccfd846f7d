//! Someone else's files beside and in the way of a checkpoint, links, and a program that is killed at every point.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::subsequence;

use super::*;
use crate::files::kills::{NO_EXCHANGE, killed_at};

const OLD: &str = r#"{"decdec": "old"}"#;
const NEW: &str = r#"{"decdec": "new"}"#;

/// Everything below a directory: files with what they hold, directories, links with where they lead.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            found.insert(path.clone(), fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes());
        } else if path.is_dir() {
            found.insert(path.clone(), b"a directory".to_vec());
            found.extend(tree(&path));
        } else {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

/// A checkpoint with these of its files, as far as its place is concerned.
fn checkpoint(dir: &Path, config: &str, files: &[&str]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(CONFIG), config).unwrap();
    files.iter().for_each(|name| fs::write(dir.join(name), config.repeat(3)).unwrap());
}

/// What [`checkpoint`] makes.
fn files_of(config: &str, files: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let all = files.iter().map(|name| (name.to_string(), config.repeat(3).into_bytes()));
    all.chain([(CONFIG.to_owned(), config.as_bytes().to_vec())]).collect()
}

fn files_in(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    tree(dir).into_iter().map(|(path, bytes)| (path.strip_prefix(dir).unwrap().display().to_string(), bytes)).collect()
}

/// A whole job whose result has these files; `meanwhile` happens before it takes its place.
fn job(out: &Path, overwrite: bool, files: &[&str], meanwhile: impl FnOnce()) -> Result<()> {
    let place = Place::take(out, "key", overwrite)?;
    place.keep("tokens.bin", b"abc")?;
    let (layer, new) = (place.file("layer-000-3bit.safetensors"), place.file("layer-000-3bit.new"));
    files::write(&new, b"layer")?;
    place.name(&new, &layer)?;
    let result = place.result()?;
    for name in files {
        files::write(&result.join(name), NEW.repeat(3).as_bytes())?;
    }
    files::write(&result.join(CONFIG), NEW.as_bytes())?;
    meanwhile();
    place.put()
}

const OTHERS: [&str; 6] = [MODEL, RESIDUALS, THRESHOLDS, BITWIDTHS, TUNED, "tokenizer.json"];

/// What people keep in the directory of a model: files, and directories (which end in `/`), also one named as a file of
/// ours.
const STRANGERS: [&str; 6] =
    [".git/", "README.md", "notes.txt", "model.safetensors.bak", "eval/", "tokenizer_config.json/"];

fn put_strangers(dir: &Path, strangers: &[&str]) {
    for name in strangers {
        let path = dir.join(name.trim_end_matches('/'));
        if name.ends_with('/') {
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("HEAD"), name).unwrap();
        } else {
            fs::write(path, name).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn killed_anywhere_the_target_is_old_or_new_and_the_same_command_ends_it(
        there in any::<bool>(),
        old in subsequence(&OTHERS[..], 0..=6),
        new in subsequence(&OTHERS[..4], 0..=4),
        linked in any::<bool>(),
        exchange in any::<bool>(),
    ) {
        let (was, will) = (files_of(OLD, &old), files_of(NEW, &new));
        NO_EXCHANGE.set(!exchange);
        for n in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let (real, link) = (dir.path().join("real"), dir.path().join("link"));
            if there {
                checkpoint(&real, OLD, &old);
            }
            put_strangers(dir.path(), &STRANGERS); // beside it
            #[cfg(unix)]
            if linked {
                std::os::unix::fs::symlink("real", &link).unwrap();
            }
            let out = if linked && cfg!(unix) { &link } else { &real };
            let beside = |dir: &Path| {
                let mut all = tree(dir);
                all.retain(|path, _| !path.starts_with(&real) && !path.starts_with(dir.join("real.partial")));
                all
            };
            let before = beside(dir.path());
            let ended = killed_at(n, || job(out, true, &new, || ()));
            prop_assert_eq!(beside(dir.path()), before.clone(), "killed at {}", n);
            let now = files_in(&real);
            let moved_away = !exchange && there && !real.exists();
            prop_assert!(now == will || there && now == was || !there && now.is_empty() || moved_away, "{}: {:?}", n, now);
            let ended = match ended {
                Some(result) => {
                    result.unwrap();
                    prop_assert!(now == will);
                    true
                }
                None => {
                    job(out, true, &new, || ()).unwrap();
                    false
                }
            };
            prop_assert_eq!(files_in(&real), will.clone(), "killed at {}", n);
            prop_assert!(!dir.path().join("real.partial").exists(), "killed at {}", n);
            prop_assert_eq!(beside(dir.path()), before, "killed at {}", n);
            if ended {
                prop_assert!(n > 20, "{} changes on disk", n);
                break;
            }
        }
        NO_EXCHANGE.set(false);
    }

    #[test]
    fn what_others_keep_in_a_checkpoint_is_named_and_stays(
        old in subsequence(&OTHERS[..], 0..=6),
        strangers in subsequence(&STRANGERS[..], 1..=6),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        checkpoint(&out, OLD, &old);
        put_strangers(&out, &strangers);
        let before = tree(dir.path());
        let message = job(&out, true, &[], || ()).unwrap_err().to_string();
        let names = |name: &&str| message.contains(name.trim_end_matches('/')) || strangers.len() == 6;
        prop_assert!(strangers.iter().all(names), "{}", message);
        prop_assert_eq!(tree(dir.path()), before);
        prop_assert!(ensure_free(&out, true).is_err());

        // Those that come while it runs are seen too, and the work is kept.
        let late = dir.path().join("late");
        checkpoint(&late, OLD, &old);
        let was = files_in(&late);
        let message = job(&late, true, &[], || put_strangers(&late, &strangers)).unwrap_err().to_string();
        prop_assert!(message.contains("did not write"), "{}", message);
        prop_assert!(was.iter().all(|(name, bytes)| files_in(&late).get(name) == Some(bytes)));
        prop_assert!(dir.path().join("late.partial/layer-000-3bit.safetensors").exists());
        strangers.iter().for_each(|name| {
            let path = late.join(name.trim_end_matches('/'));
            if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
        });
        job(&late, true, &[], || ()).unwrap();
        prop_assert_eq!(files_in(&late), files_of(NEW, &[]));
    }
}

#[test]
fn what_came_at_the_last_moment_is_not_removed() {
    // The old checkpoint has changed places, and someone has written into it since.
    let dir = tempfile::tempdir().unwrap();
    let (out, old) = (dir.path().join("out"), dir.path().join("out.partial/checkpoint"));
    let place = Place::take(&out, "key", false).unwrap();
    checkpoint(&old, OLD, &[MODEL]);
    fs::write(old.join("notes.txt"), "mine").unwrap();
    let message = place.result().unwrap_err().to_string();
    assert!(message.contains("notes.txt"), "{message}");
    drop(place);
    let message = Place::take(&out, "another key", false).unwrap_err().to_string();
    assert!(message.contains("notes.txt"), "{message}");
    assert_eq!(fs::read(old.join("notes.txt")).unwrap(), b"mine");
    // Nor is what someone has put beside unfinished work.
    fs::remove_file(old.join("notes.txt")).unwrap();
    fs::write(dir.path().join("out.partial/notes.txt"), "mine").unwrap();
    let message = job(&out, false, &[], || ()).unwrap_err().to_string();
    assert!(message.contains("something else (notes.txt)"), "{message}");
    assert_eq!(fs::read(dir.path().join("out.partial/notes.txt")).unwrap(), b"mine");
    fs::remove_file(dir.path().join("out.partial/notes.txt")).unwrap();
    job(&out, false, &[MODEL], || fs::write(dir.path().join("out.partial/late.txt"), "mine").unwrap()).unwrap();
    assert_eq!(files_in(&out), files_of(NEW, &[MODEL]));
    assert_eq!(files_in(&dir.path().join("out.partial")), BTreeMap::from([("late.txt".into(), b"mine".to_vec())]));
}

#[test]
fn a_checkpoint_that_came_meanwhile_is_not_replaced_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let message = job(&out, false, &[], || checkpoint(&out, OLD, &[MODEL])).unwrap_err().to_string();
    assert!(message.contains("use --overwrite"), "{message}");
    assert_eq!(files_in(&out), files_of(OLD, &[MODEL]));
    job(&out, true, &[], || ()).unwrap();
    assert_eq!(files_in(&out), files_of(NEW, &[]));
}

#[cfg(unix)]
#[test]
fn links_that_lead_nowhere_to_a_file_or_in_a_circle() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    symlink("new", at("dangling")).unwrap();
    job(&at("dangling"), false, &[MODEL], || ()).unwrap();
    assert!(at("dangling").is_symlink() && !at("dangling.partial").exists());
    assert_eq!(files_in(&at("new")), files_of(NEW, &[MODEL]));

    fs::write(at("file"), "mine").unwrap();
    symlink("file", at("to-file")).unwrap();
    symlink("circle", at("circle")).unwrap();
    symlink("new", at("out.partial")).unwrap();
    let before = tree(dir.path());
    for (out, says) in [
        ("file", "is not a decdec checkpoint"),
        ("to-file", "is not a decdec checkpoint"),
        ("circle", "cannot find"),
        ("out", "leads to another place"),
        ("", "is not a decdec checkpoint"),
    ] {
        let message = format!("{:#}", job(&at(out), true, &[], || ()).unwrap_err());
        assert!(message.contains(says), "{out}: {message}");
    }
    assert_eq!(tree(dir.path()), before);
    // Weights that lie elsewhere stay there.
    checkpoint(&at("linked"), OLD, &[]);
    symlink("../file", at("linked").join(MODEL)).unwrap();
    job(&at("linked"), true, &[MODEL], || ()).unwrap();
    assert_eq!(fs::read(at("file")).unwrap(), b"mine");
    assert_eq!(files_in(&at("linked")), files_of(NEW, &[MODEL]));
}

#[cfg(unix)]
#[test]
fn whom_the_directory_was_closed_to_it_stays_closed_to() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    checkpoint(&out, OLD, &[]);
    fs::set_permissions(&out, fs::Permissions::from_mode(0o700)).unwrap();
    job(&out, true, &[], || ()).unwrap();
    assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o700);
}

#[cfg(target_os = "linux")]
#[test]
fn places_that_cannot_be_moved_are_refused_at_once() {
    assert!(is_mount_point(Path::new("/proc")));
    let dir = tempfile::tempdir().unwrap();
    assert!(!is_mount_point(dir.path()));
}

#[test]
fn what_texts_write_is_of_a_checkpoint() {
    let texts = TextFiles {
        tokenizer_json: b"{}".to_vec(),
        chat_template: Some("{{ messages }}".into()),
        special_tokens: [("bos_token".into(), Some("<s>".into()))].into(),
        eos_token_ids: vec![2],
    };
    let dir = tempfile::tempdir().unwrap();
    texts.write(dir.path()).unwrap();
    assert!(files_in(dir.path()).keys().all(|name| is_of_checkpoint(name, false)));
    assert_eq!(files_in(dir.path()).len(), TextFiles::NAMES.len());
}
