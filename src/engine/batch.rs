//! Several texts that are made together, one pass at a time.

use super::session::Asked;
use super::{Engine, Error, ErrorKind, Generated, Piece, Result, Session, Settings};
use crate::backend::DECODE_ROWS;
use crate::tokenizer::Message;

/// Rows of prompts that one pass takes beside the tokens of other texts, where nobody says how many: more of them are read
/// faster, and hold up the others for longer.
const PROMPT_ROWS: usize = 256;

/// One text of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TextId(u64);

/// What has become of a text in a pass.
#[derive(Debug)]
pub enum Event {
    /// It has gone on: a token and its text.
    Piece(TextId, Piece),
    /// It has ended, and left the batch.
    End(TextId, Generated),
    /// It cannot go on, and has left the batch; the others go on.
    Failed(TextId, Error),
}

/// Several texts that are made together. Each gets the tokens that it would get alone.
///
/// Texts join and leave between passes. A pass takes one token of every text that has read its prompt, and beside them as
/// much of the other prompts as [`Batch::prompt_rows`] says. What a text has read stays when it leaves, until its slot is
/// needed: one that begins alike goes on from there.
pub struct Batch<'e, 'd> {
    engine: &'e Engine<'d>,
    /// Rows of prompts in one pass, all texts together.
    pub prompt_rows: usize,
    members: Vec<Member<'e, 'd>>,
    /// Sessions that have no text to make, and what they hold.
    idle: Vec<Session<'e, 'd>>,
    /// What has happened and was not told yet.
    events: Vec<Event>,
    next: u64,
}

struct Member<'e, 'd> {
    id: TextId,
    session: Session<'e, 'd>,
    /// A pass is queued that chooses a token of it.
    waits: bool,
}

impl<'e, 'd> Batch<'e, 'd> {
    pub(super) fn new(engine: &'e Engine<'d>) -> Self {
        let (prompt_rows, members, idle, events) = (PROMPT_ROWS, Vec::new(), Vec::new(), Vec::new());
        Self { engine, prompt_rows, members, idle, events, next: 0 }
    }

    /// A text that goes on from `tokens` joins.
    ///
    /// # Errors
    /// [`ErrorKind::NoSlot`]: as many texts as the engine has slots. Those of [`Session::prompt`], or no memory for another
    /// text.
    pub fn join(&mut self, tokens: &[u32], settings: Settings) -> Result<TextId> {
        let mut session = self.session_for(tokens)?;
        session.settings = settings;
        if let Err(error) = session.prompt(tokens) {
            self.idle.push(session);
            return Err(error);
        }
        let id = TextId(self.next);
        self.next += 1;
        self.members.push(Member { id, session, waits: false });
        Ok(id)
    }

    /// A text that goes on from `text` joins.
    ///
    /// # Errors
    /// Those of [`Batch::join`], and a model without a tokenizer.
    pub fn join_text(&mut self, text: &str, settings: Settings) -> Result<TextId> {
        let tokens = self.engine.tokenizer()?.encode(text).map_err(Error::input)?;
        self.join(&tokens, settings)
    }

    /// The answer to a conversation joins.
    ///
    /// # Errors
    /// Those of [`Batch::join`], and a model without a chat template.
    pub fn join_chat(&mut self, messages: &[Message], settings: Settings) -> Result<TextId> {
        let tokens = self.engine.tokenizer()?.chat_ids(messages, true).map_err(Error::input)?;
        self.join(&tokens, settings)
    }

    /// The idle session that holds the longest part of `tokens`; a new one where none holds any, as long as there are slots.
    fn session_for(&mut self, tokens: &[u32]) -> Result<Session<'e, 'd>> {
        let common = |session: &Session| session.in_common(tokens);
        let best = (0..self.idle.len()).max_by_key(|&i| common(&self.idle[i]));
        if let Some(i) = best.filter(|&i| common(&self.idle[i]) > 0) {
            return Ok(self.idle.remove(i));
        }
        match self.engine.session(Settings::default()) {
            // What was idle for longest goes.
            Err(error) if error.kind() == ErrorKind::NoSlot && !self.idle.is_empty() => Ok(self.idle.remove(0)),
            made => made,
        }
    }

    /// The text ends here and leaves; what was made of it. `None` if it is not in the batch (any more).
    pub fn cancel(&mut self, id: TextId) -> Option<Generated> {
        let i = self.members.iter().position(|member| member.id == id)?;
        let mut member = self.members.remove(i);
        // What cannot be decoded any more is no loss: nobody wants it.
        let _ = member.session.stop();
        let made = member.session.made().clone();
        self.events.retain(|event| event.id() != id);
        self.idle.push(member.session);
        Some(made)
    }

    /// What was made of a text so far.
    pub fn made(&self, id: TextId) -> Option<&Generated> {
        self.members.iter().find(|member| member.id == id).map(|member| member.session.made())
    }

    /// Texts in the batch.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty() && self.events.is_empty()
    }

    /// One pass; what has become of the texts in it. Nothing, where a pass only read parts of prompts, or where the batch is
    /// empty.
    ///
    /// # Errors
    /// [`ErrorKind::Stopped`]: the interruption of [`device::Options`](crate::device::Options) came; another call goes on
    /// where it was if that is taken back. Whatever else goes wrong is told of the texts that it befell.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        self.engine.ensure_running()?;
        if !self.members.iter().any(|member| member.waits) {
            self.queue();
        }
        self.collect()?;
        Ok(std::mem::take(&mut self.events))
    }

    /// Queues a pass: a token of every text that is so far, then prompts.
    fn queue(&mut self) {
        let asked = self.asked();
        if asked.is_empty() {
            return;
        }
        let parts: Vec<_> = asked.iter().map(|(_, asked)| asked.part()).collect();
        match self.engine.runner.borrow_mut().pass(&parts) {
            Ok(()) => {
                for (id, asked) in asked {
                    let member = self.members.iter_mut().find(|member| member.id == id).expect("it has asked");
                    member.waits = asked.chooses();
                    member.session.sent(asked);
                }
            }
            Err(error) => {
                // All rows of a pass have the same fate.
                let error = Error::from(error);
                for (id, _) in asked {
                    self.fail(id, Error::new(error.kind(), error.to_string()));
                }
            }
        }
    }

    /// What each text wants of the next pass, as far as there is room in it. Whose turn it was goes behind the others where
    /// not all have one.
    fn asked(&mut self) -> Vec<(TextId, Asked)> {
        let most = self.engine.runner.borrow().max_tokens();
        let decoding = self.members.iter().filter(|member| member.session.has_read()).count();
        let each = (DECODE_ROWS.min(most) / decoding.max(1)).max(1);
        let (mut all, mut choices, mut rows) = (Vec::new(), DECODE_ROWS.min(most), most);
        let mut prompts = self.prompt_rows.max(1);
        for reads in [false, true] {
            for i in 0..self.members.len() {
                let member = &mut self.members[i];
                if member.session.has_read() == reads || choices == 0 || rows == 0 {
                    continue;
                }
                let room = if reads { prompts.min(rows) } else { each.min(choices).min(rows) };
                match member.session.ask(room) {
                    Ok(Some(asked)) => {
                        let taken = asked.rows();
                        (rows, choices) = (rows - taken, choices - asked.choices());
                        prompts -= if reads { taken } else { 0 };
                        all.push((member.id, asked));
                    }
                    Ok(None) => {}
                    Err(error) => self.events.push(Event::Failed(member.id, error)),
                }
                if reads && prompts == 0 {
                    break;
                }
            }
        }
        if choices == 0 {
            let turn: Vec<_> = all.iter().map(|(id, _)| *id).collect();
            self.members.sort_by_key(|member| turn.contains(&member.id));
        }
        self.leave();
        all
    }

    /// Waits for the tokens that were chosen, and takes them.
    fn collect(&mut self) -> Result<()> {
        for i in 0..self.members.len() {
            let member = &mut self.members[i];
            let id = member.id;
            if member.waits {
                match member.session.settle() {
                    Err(error) if error.kind() == ErrorKind::Stopped => {
                        self.leave();
                        return Err(error);
                    }
                    Err(error) => self.events.push(Event::Failed(id, error)),
                    Ok(()) => {}
                }
                member.waits = false;
            }
            while let Some(piece) = member.session.take_ready() {
                match piece {
                    Ok(Some(piece)) => self.events.push(Event::Piece(id, piece)),
                    Ok(None) => {}
                    Err(error) => self.events.push(Event::Failed(id, error)),
                }
            }
            if member.session.made().finish.is_some() {
                self.events.push(Event::End(id, member.session.made().clone()));
            }
        }
        self.leave();
        Ok(())
    }

    fn fail(&mut self, id: TextId, error: Error) {
        if let Some(member) = self.members.iter_mut().find(|member| member.id == id) {
            member.session.give_up();
            self.events.push(Event::Failed(id, error));
        }
        self.leave();
    }

    /// Texts that have ended are members no more.
    fn leave(&mut self) {
        let gone = |member: &Member| {
            self.events.iter().any(|event| event.id() == member.id && !matches!(event, Event::Piece(..)))
        };
        let (gone, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut self.members).into_iter().partition(gone);
        self.members = stay;
        self.idle.extend(gone.into_iter().map(|member| member.session));
    }
}

impl Event {
    /// Whose it is.
    pub fn id(&self) -> TextId {
        match self {
            Self::Piece(id, _) | Self::End(id, _) | Self::Failed(id, _) => *id,
        }
    }
}
