//! Text to ids and back: SmolLM2's known answers, and small tokenizers written here.

mod fixtures;

use decdec::source::Source;
use decdec::tokenizer::{Message, Tokenizer};
use decdec::weights::ModelWeights;
use serde_json::Value;

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn golden_smollm2_ids_and_texts() {
    let (Some(path), Some(cases)) = (fixtures::smollm2(), fixtures::reference("smollm2/greedy.json")) else { return };
    let cases: Value = serde_json::from_slice(&std::fs::read(cases).expect("readable")).expect("JSON");
    let source = Source::open(&path).expect("the model opens");
    let tokenizer = Tokenizer::new(source.texts(), source.config()).expect("its tokenizer loads");
    assert_eq!(tokenizer.stop_ids(), [2]);
    assert_eq!(tokenizer.bos(), Some(1));
    for case in cases.as_array().expect("a list") {
        let text = |key: &str| case[key].as_str().expect("a text");
        assert_eq!(tokenizer.encode(text("prompt")).expect("ids"), ids(&case["ids"]), "{}", text("prompt"));

        let chat = tokenizer.chat(&[Message::new("user", text("prompt"))], true).expect("the template works");
        assert_eq!(chat, text("chat"));
        assert_eq!(tokenizer.encode_chat(&chat).expect("ids"), ids(&case["chat_ids"]));
        assert_eq!(tokenizer.encode(&chat).expect("ids"), ids(&case["chat_ids"]), "BOS is there already");

        for (tokens, expected) in [("ids", "prompt"), ("greedy", "greedy_text"), ("chat_greedy", "chat_text")] {
            assert_eq!(tokenizer.decode(&ids(&case[tokens])).expect("a text"), text(expected));
            assert_eq!(streamed(&tokenizer, &ids(&case[tokens])), text(expected));
        }
    }
    let wrong = tokenizer.encode("What is the capital of  France?").expect("ids");
    assert_ne!(wrong, ids(&cases[0]["ids"]), "a space more is another text");
}

/// What a stream hands out, put together.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut text: String = ids.iter().filter_map(|&id| stream.push(id).expect("a token")).collect();
    text.extend(stream.flush().expect("the rest"));
    text
}
