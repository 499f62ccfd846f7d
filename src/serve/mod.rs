//! A server of OpenAI's protocol: many clients, one engine.
//!
//! ```text
//! clients ── http ── app ── chat, completions, … ── line ── scheduler ── Texts (an engine, or a script)
//!           tokio's threads                        queue    the thread that opened the device
//! ```
//! Requests are read, checked and tokenized on the server's threads. What is to be made waits in a [`Line`]; a
//! [`Scheduler`] on the engine's thread makes all texts together, step by step, and tells what it makes as events.
//! Whoever asked turns them into an answer. When a client goes, nobody listens to its events any more, and the text is
//! left before the next step, wherever it is: in the queue, in its prompt, in its answer.
//!
//! | file | what is in it |
//! |---|---|
//! | `http` | connections, and how a server ends |
//! | `app`, `problem`, `fields`, `keys` | what requests share: routes, who may ask, reading bodies, what is wrong |
//! | `rules`, `messages`, `tools` | the parts of requests: how a text is made, a conversation, functions |
//! | `completions`, `chat`, `responses`, `anthropic` | requests and answers in the words of each protocol |
//! | `sse`, `told`, `said` | answers in parts; tokens, probabilities and usage as they are told |
//! | `marks`, `python` | thoughts and calls in what a model says |
//! | `tokenize`, `info`, `metrics`, `openapi` | tokens of texts; what the server says of itself |
//! | `page` | a page to chat on |
//! | `adjust` | compensation that changes while texts are made |
//! | `job`, `line` | one text that is asked for, and those that wait |
//! | `scheduler`, `active`, `choose`, `guide` | who reads what in a step, and how the next token is chosen |
//! | `texts`, `engine` | what is asked of a model, and the engine as that |

mod active;
mod adjust;
mod anthropic;
mod app;
mod chat;
mod choose;
mod completions;
mod engine;
mod fields;
mod guide;
mod http;
mod info;
mod job;
mod keys;
mod line;
mod marks;
mod messages;
mod metrics;
mod openapi;
mod page;
mod problem;
mod python;
mod responses;
mod rules;
mod said;
mod scheduler;
mod sse;
mod texts;
mod tokenize;
mod told;
mod tools;

pub use app::{App, Options};
pub use engine::Slots;
pub use http::{Ending, Server};
pub use keys::Keys;
pub use line::Line;
pub use scheduler::Scheduler;
pub use texts::{Choose, Chosen, Reading, Texts};
