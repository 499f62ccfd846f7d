//! A hub of our own on two ports: one lists models and says what files are, the other has the bytes of large ones, as
//! the Hugging Face Hub and its content network do. It fails where a test tells it to.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use ring::digest;

/// The only commit.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// This status, and a header.
    Status(u16, &'static str, &'static str),
    /// One byte of the body is another one.
    Flip,
    /// The whole body, whatever part was asked for.
    NoParts,
}

/// A request that came.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) line: String,
    pub(crate) token: Option<String>,
    pub(crate) range: Option<String>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// What the hub wants to see; none for a model that all may see.
    token: Option<String>,
    faults: BTreeMap<String, VecDeque<Fault>>,
    asked: Vec<Asked>,
}

/// A hub with the one model `small/model`.
pub(crate) struct Server {
    state: Arc<Mutex<State>>,
    /// The address of the hub.
    pub(crate) endpoint: String,
}

/// What is answered: status, headers, body, and how many of its bytes are really sent.
struct Reply(u16, Vec<(String, String)>, Vec<u8>, usize);

impl Reply {
    fn of(status: u16, headers: &[(&str, String)], body: Vec<u8>) -> Self {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let sent = body.len();
        Self(status, headers, body, sent)
    }
}

impl Server {
    pub(crate) fn new(files: BTreeMap<String, Vec<u8>>) -> Self {
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let bind = || TcpListener::bind("127.0.0.1:0").expect("a port");
        let (hub, content) = (bind(), bind());
        let at = |listener: &TcpListener| format!("http://{}", listener.local_addr().expect("bound"));
        let (endpoint, elsewhere) = (at(&hub), at(&content));
        for listener in [hub, content] {
            let (state, elsewhere) = (Arc::clone(&state), elsewhere.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (state, elsewhere) = (Arc::clone(&state), elsewhere.clone());
                    // A client that goes away is no matter of this test.
                    std::thread::spawn(move || drop(serve(stream, &state, &elsewhere)));
                }
            });
        }
        Self { state, endpoint }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }

    /// From now on, only who has this token sees the model.
    pub(crate) fn lock(&self, token: &str) {
        self.state().token = Some(token.to_owned());
    }

    /// The next requests for what ends so fail, one after the other.
    pub(crate) fn fail(&self, end: &str, faults: &[Fault]) {
        self.state().faults.entry(end.to_owned()).or_default().extend(faults);
    }

    /// Puts a file there, or another one in its place.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) {
        self.state().files.insert(name.to_owned(), bytes.to_vec());
    }

    /// Takes a file away.
    pub(crate) fn remove(&self, name: &str) {
        self.state().files.remove(name);
    }

    /// The requests since this was asked last.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state().asked)
    }

    /// The hash that a large file goes by.
    pub(crate) fn sha256(&self, name: &str) -> String {
        hex(&self.state().files[name])
    }
}

/// Answers one request.
fn serve(mut stream: TcpStream, state: &Mutex<State>, elsewhere: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let line = lines.next().transpose()?.unwrap_or_default();
    let mut headers = BTreeMap::new();
    for header in lines {
        let header = header?;
        let Some((name, value)) = header.split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let mut words = line.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let asked = Asked {
        line: format!("{method} {path}"),
        token: headers.get("authorization").cloned(),
        range: headers.get("range").cloned(),
    };
    let reply = {
        let mut state = state.lock().expect("no panic");
        state.asked.push(asked.clone());
        let fault = state.faults.iter_mut().find(|(end, faults)| path.ends_with(*end) && !faults.is_empty());
        let fault = fault.and_then(|(_, faults)| faults.pop_front());
        answer(&state, path, &asked, elsewhere, fault)
    };
    let Reply(status, headers, body, sent) = reply;
    write!(stream, "HTTP/1.1 {status} Of a test\r\nConnection: close\r\nContent-Length: {}\r\n", body.len())?;
    headers.iter().try_for_each(|(name, value)| write!(stream, "{name}: {value}\r\n"))?;
    stream.write_all(b"\r\n")?;
    if method != "HEAD" {
        stream.write_all(&body[..sent])?;
    }
    stream.flush()
}

fn answer(state: &State, path: &str, asked: &Asked, elsewhere: &str, fault: Option<Fault>) -> Reply {
    if let Some(Fault::Status(status, name, value)) = fault {
        return Reply::of(status, &[(name, value.to_owned())], b"of a test".to_vec());
    }
    if let Some(hash) = path.strip_prefix("/content/") {
        return content(state, hash, asked, fault);
    }
    let may = state.token.as_ref().is_none_or(|token| asked.token.as_deref() == Some(&format!("Bearer {token}")));
    if !may || !path.contains("small/model") {
        // The hub does not tell strangers what there is.
        return Reply::of(401, &[("X-Error-Code", "RepoNotFound".into())], Vec::new());
    }
    if let Some(revision) = path.strip_prefix("/api/models/small/model/revision/") {
        if revision != "main" && revision != COMMIT {
            return Reply::of(404, &[("X-Error-Code", "RevisionNotFound".into())], Vec::new());
        }
        let files: Vec<_> = state.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let json = serde_json::json!({ "id": "small/model", "sha": COMMIT, "siblings": files });
        return Reply::of(200, &[("Content-Type", "application/json".into())], json.to_string().into_bytes());
    }
    let at = |revision: &str| path.strip_prefix(&format!("/small/model/resolve/{revision}/"));
    let name = at(COMMIT).or(at("main"));
    let Some((name, bytes)) = name.and_then(|name| Some((name, state.files.get(name)?))) else {
        return Reply::of(404, &[("X-Error-Code", "EntryNotFound".into())], Vec::new());
    };
    let hash = hex(bytes);
    let commit = ("X-Repo-Commit", COMMIT.to_owned());
    if name.ends_with(".safetensors") {
        let place = ("Location", format!("{elsewhere}/content/{hash}"));
        let size = ("X-Linked-Size", bytes.len().to_string());
        let other = ("ETag", "\"of-the-redirection\"".to_owned());
        return Reply::of(
            302,
            &[commit, place, size, other, ("X-Linked-Etag", format!("\"{hash}\""))],
            b"moved".to_vec(),
        );
    }
    // The name that git gives a small file: not its SHA-256.
    Reply::of(200, &[commit, ("ETag", format!("\"{}\"", &hash[..40]))], bytes.clone())
}

/// The bytes of a large file, or a part of them.
fn content(state: &State, hash: &str, asked: &Asked, fault: Option<Fault>) -> Reply {
    let Some(bytes) = state.files.values().find(|bytes| hex(bytes) == hash) else {
        return Reply::of(404, &[], Vec::new());
    };
    let from = asked.range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let from = from.filter(|_| !matches!(fault, Some(Fault::NoParts)));
    let mut reply = match from {
        None => Reply::of(200, &[], bytes.clone()),
        Some(from) if from < bytes.len() => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            Reply::of(206, &[("Content-Range", range)], bytes[from..].to_vec())
        }
        Some(_) => Reply::of(416, &[], Vec::new()),
    };
    match fault {
        Some(Fault::Cut(after)) => reply.3 = after.min(reply.2.len()),
        Some(Fault::Flip) => reply.2[0] ^= 1,
        _ => {}
    }
    reply
}

fn hex(bytes: &[u8]) -> String {
    let hash = digest::digest(&digest::SHA256, bytes);
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
