//! Answers in parts: server-sent events, as they are heard of.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::Response;
use serde_json::Value;
use tokio::sync::mpsc::channel;
use tokio::time::{Instant, interval_at, timeout};
use tokio_stream::wrappers::ReceiverStream;

use super::app::Events;
use super::job::{End, Event};
use super::line::ENDED;

/// How often a client hears that there is somebody, while a prompt is read.
const PING: Duration = Duration::from_secs(10);

/// How long a client may leave what was sent to it unread.
const SLOW: Duration = Duration::from_secs(60);

/// What is said of events, in one of the protocols.
pub(super) trait Protocol: Send + 'static {
    /// Says what comes first.
    fn begin(&mut self, _out: &mut Out) {}
    /// Says what is heard of text `index`, its end apart.
    fn hear(&mut self, index: usize, event: Event, out: &mut Out);
    /// Says that text `index` has ended.
    fn end(&mut self, index: usize, end: &End, out: &mut Out);
    /// Says what comes last.
    fn close(&mut self, out: &mut Out);
    /// Says what went wrong; nothing follows.
    fn fail(&mut self, said: &str, out: &mut Out);
}

/// What is sent next.
#[derive(Debug, Default)]
pub(super) struct Out(String);

impl Out {
    /// An event without a name.
    pub(super) fn data(&mut self, value: &Value) {
        self.text(&value.to_string());
    }

    /// The same with any text of one line.
    pub(super) fn text(&mut self, text: &str) {
        self.0.push_str("data: ");
        self.0.push_str(text);
        self.0.push_str("\n\n");
    }

    /// An event with a name.
    pub(super) fn named(&mut self, name: &str, value: &Value) {
        self.0.push_str("event: ");
        self.0.push_str(name);
        self.0.push('\n');
        self.data(value);
    }
}

/// The answer whose events `protocol` makes of those of `count` texts.
///
/// When the client goes, nobody listens to the texts any more, and the engine leaves them.
pub(super) fn respond(mut events: Events, count: usize, mut protocol: impl Protocol) -> Response {
    let (sender, body) = channel::<Result<Bytes, std::convert::Infallible>>(8);
    tokio::spawn(async move {
        let mut out = Out::default();
        let mut left = count;
        let mut ping = interval_at(Instant::now() + PING, PING);
        protocol.begin(&mut out);
        while left > 0 {
            if !out.0.is_empty() {
                let bytes = Bytes::from(std::mem::take(&mut out.0));
                if !matches!(timeout(SLOW, sender.send(Ok(bytes))).await, Ok(Ok(()))) {
                    return;
                }
                ping.reset();
            }
            let heard = tokio::select! {
                heard = events.recv() => heard,
                () = sender.closed() => return,
                _ = ping.tick() => {
                    out.0.push_str(": ping\n\n");
                    continue;
                }
            };
            let said = match heard {
                Some((index, Event::End(end))) => {
                    protocol.end(index, &end, &mut out);
                    left -= 1;
                    continue;
                }
                Some((_, Event::Failed(said))) => said,
                Some((index, event)) => {
                    protocol.hear(index, event, &mut out);
                    continue;
                }
                None => ENDED.to_owned(),
            };
            protocol.fail(&said, &mut out);
            let _ = timeout(SLOW, sender.send(Ok(Bytes::from(out.0)))).await;
            return;
        }
        protocol.close(&mut out);
        let _ = timeout(SLOW, sender.send(Ok(Bytes::from(out.0)))).await;
    });
    let response = Response::builder()
        .header(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")
        .header(header::CACHE_CONTROL, "no-cache")
        .header("x-accel-buffering", "no")
        .body(Body::from_stream(ReceiverStream::new(body)));
    response.unwrap_or_default()
}
