//! A client that says exactly what it is told to, byte by byte, and a server to talk to.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use decdec::serve::{App, Ending, Keys, Line, Options, Scheduler, Server};
use decdec::tokenizer::Tokenizer;
use serde_json::Value;

use crate::script::{self, Script, Seen};

/// How a scripted server is set up.
pub(crate) struct Setup {
    pub(crate) template: &'static str,
    pub(crate) slots: usize,
    pub(crate) room: usize,
    pub(crate) queue: usize,
    pub(crate) delay: Duration,
    pub(crate) keys: Keys,
    pub(crate) origins: Vec<String>,
    pub(crate) ending: Ending,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            template: script::TEMPLATE,
            slots: 4,
            room: 1000,
            queue: 16,
            delay: Duration::ZERO,
            keys: Keys::default(),
            origins: Vec::new(),
            ending: Ending { notice: Duration::ZERO, limit: Duration::from_secs(20) },
        }
    }
}

/// What is served under test.
pub(crate) fn options(setup: &Setup) -> Options {
    Options {
        names: vec!["scripted".into(), "alias".into()],
        max_seq_len: setup.room,
        keys: setup.keys.clone(),
        body_limit: 100_000,
        origins: setup.origins.clone(),
        compensate_prompt: false,
        adjustable: true,
        chat_template: Some(setup.template.to_owned()),
        device: "script".into(),
    }
}

/// A server whose model is a script.
pub(crate) struct Scripted {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Mutex<Seen>>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) server: Option<Server>,
    pub(crate) engine: Option<JoinHandle<bool>>,
}

impl Scripted {
    pub(crate) fn start(setup: Setup) -> Self {
        let tokenizer = Arc::new(script::tokenizer(setup.template));
        let line = Arc::new(Line::new(setup.queue));
        let app = App::new(Arc::clone(&line), Arc::clone(&tokenizer), options(&setup));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let server = Server::start(listener, app, 512, setup.ending).expect("a server");
        let (texts, seen) = Script::new(Arc::clone(&tokenizer), setup.slots, setup.room, setup.delay);
        let shared = Arc::clone(&tokenizer);
        let engine =
            std::thread::spawn(move || Scheduler::new(texts, &line, &shared, Duration::from_millis(50)).run().is_ok());
        let started = Self { address: server.address(), seen, tokenizer, server: Some(server), engine: Some(engine) };
        started.until("it is ready", || started.get("/ready").status == 200);
        started
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        exchange(self.address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        exchange(self.address, &post(path, &body.to_string()))
    }

    /// The answer to a request that has to be answered.
    pub(crate) fn ok(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body);
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()
    }

    /// The data of the events of a stream, which has to end with `[DONE]`.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.post(path, body);
        assert_eq!(response.status, 200, "{}", response.body);
        events(&response.body)
    }

    /// Waits for something that comes soon.
    pub(crate) fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let started = Instant::now();
        while !holds() {
            assert!(started.elapsed() < Duration::from_secs(20), "{what} does not come");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Slots in which a text is being made.
    pub(crate) fn busy(&self) -> usize {
        let slots = self.get("/slots").json();
        slots.as_array().expect("slots").iter().filter(|slot| slot["is_processing"] == true).count()
    }

    pub(crate) fn steps(&self) -> usize {
        self.seen.lock().expect("no panic").steps.len()
    }

    /// A metric's number.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let page = self.get("/metrics").body;
        let line = page.lines().find(|line| line.starts_with(name) && !line.starts_with('#'));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("{name} is not in {page}"))
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
            server.wait();
        }
        if let Some(engine) = self.engine.take() {
            let _ = engine.join();
        }
    }
}

/// A request with a JSON body.
pub(crate) fn post(path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("set");
    stream
}

/// Sends `request`, and reads until the server closes.
pub(crate) fn exchange(address: SocketAddr, request: &str) -> Response {
    let mut stream = connect(address);
    // A server that refuses a request need not read all of it.
    let _ = stream.write_all(request.as_bytes());
    Response::read(&mut stream)
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Response {
    pub(crate) fn read(stream: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let at = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("no head in {bytes:?}"));
        let head = String::from_utf8(bytes[..at].to_vec()).expect("text").to_lowercase();
        let mut body = bytes[at + 4..].to_vec();
        if head.contains("transfer-encoding: chunked") {
            body = unchunked(&body);
        }
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        Self { status, head, body: String::from_utf8(body).expect("whole characters") }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

fn unchunked(mut rest: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(at) = rest.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..at]).expect("text"), 16).expect("a length");
        if size == 0 {
            break;
        }
        whole.extend(&rest[at + 2..at + 2 + size]);
        rest = &rest[at + 4 + size..];
    }
    whole
}

/// The data of a stream's events, the last of which is `[DONE]`.
pub(crate) fn events(body: &str) -> Vec<Value> {
    let mut data: Vec<&str> = Vec::new();
    for block in body.split_terminator("\n\n") {
        match block.strip_prefix("data: ") {
            Some(text) => data.push(text),
            None => assert!(block.starts_with(": "), "{block:?} is neither data nor a comment"),
        }
    }
    assert_eq!(data.pop(), Some("[DONE]"), "{body}");
    data.into_iter().map(|text| serde_json::from_str(text).expect("JSON")).collect()
}
