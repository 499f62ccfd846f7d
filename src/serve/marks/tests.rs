//! Answers of every family, cut at every place.

use super::*;

/// A template's marks, an answer, and what it is: thoughts, what is said, calls.
type Case = (&'static str, &'static str, &'static str, &'static str, &'static [(&'static str, &'static str)]);

const TOOLS: [&str; 2] = ["get_weather", "now"];

const CASES: [Case; 19] = [
    // Qwen, SmolLM3, Granite 4
    (
        "<tool_call>",
        "Let me see.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"東京\"}}\n</tool_call>",
        "",
        "Let me see.",
        &[("get_weather", "{\"city\":\"東京\"}")],
    ),
    (
        "<tool_call>",
        "<tool_call>{\"name\": \"now\"}</tool_call>\n<tool_call>{\"name\": \"now\", \
         \"arguments\": {\"a\": \"</tool\"}}</tool_call>",
        "",
        "",
        &[("now", "{}"), ("now", "{\"a\":\"</tool\"}")],
    ),
    (
        "<tool_call><think>",
        "<think>\nWhat <tool\nis it?\n</think>\n\nIt is 5 < 6 <tool> x",
        "What <tool\nis it?",
        "It is 5 < 6 <tool> x",
        &[],
    ),
    (
        "<tool_call><think>",
        "<think></think><tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>",
        "",
        "",
        &[("now", "{}")],
    ),
    ("<tool_call><think>", "  plain </think", "", "  plain </think", &[]),
    // What is no call is told as it was said.
    ("<tool_call>", "<tool_call>{\"name\": </tool_call> so", "", "<tool_call>{\"name\": </tool_call>so", &[]),
    ("<tool_call>", "a <tool_call>{\"name\": \"now\"", "", "a<tool_call>{\"name\": \"now\"", &[]),
    // Mistral
    (
        "[TOOL_CALLS]",
        "[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": {\"city\": \"a]b\"}}, \
         {\"name\": \"now\", \"arguments\": \"{}\"}]",
        "",
        "",
        &[("get_weather", "{\"city\":\"a]b\"}"), ("now", "{}")],
    ),
    ("[TOOL_CALLS]", "[TOOL_CALL is [1]", "", "[TOOL_CALL is [1]", &[]),
    // Ministral 3
    (
        "[TOOL_CALLS] [ARGS] [THINK]",
        "[THINK]hm[/THINK][TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{\"city\": \"x\"}",
        "hm",
        "",
        &[("now", "{}"), ("get_weather", "{\"city\":\"x\"}")],
    ),
    // Granite 3, Phi-4
    ("<|tool_call|>", "<|tool_call|>[{\"name\": \"now\", \"arguments\": {}}]<|/tool_call|>", "", "", &[("now", "{}")]),
    // Llama 3
    (
        "<|python_tag|>",
        "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"x\"}}",
        "",
        "",
        &[("get_weather", "{\"city\":\"x\"}")],
    ),
    (
        "<|python_tag|>",
        "<|python_tag|>{\"name\": \"now\", \"parameters\": {}}; {\"name\": \"now\", \"parameters\": {}}",
        "",
        "",
        &[("now", "{}"), ("now", "{}")],
    ),
    (
        "<|python_tag|>",
        "{\"name\": \"Berlin\", \"parameters\": 3}",
        "",
        "{\"name\": \"Berlin\", \"parameters\": 3}",
        &[],
    ),
    ("<|python_tag|>", "<|py is a tag", "", "<|py is a tag", &[]),
    // GLM-4
    ("<|observation|>", "get_weather\n{\"city\": \"x\"}", "", "", &[("get_weather", "{\"city\":\"x\"}")]),
    ("<|observation|>", "get_weather is a function", "", "get_weather is a function", &[]),
    // OLMo 3
    (
        "<function_calls>",
        "Now.\n<function_calls>\nnow()\nget_weather(city=\"x\")\n</function_calls>",
        "",
        "Now.",
        &[("now", "{}"), ("get_weather", "{\"city\":\"x\"}")],
    ),
    // Gemma and others have no marks.
    (
        "<start_of_turn>",
        " <think> {\"name\": \"now\"} <tool_call>",
        "",
        " <think> {\"name\": \"now\"} <tool_call>",
        &[],
    ),
];

/// Thoughts, what is said, and calls, of an answer that comes in these parts.
fn split(template: &str, parts: &[&str]) -> (String, String, Vec<(String, String)>) {
    let mut splitter = Splitter::new(&Marks::of(template), &TOOLS.map(str::to_owned), "<|im_start|>assistant\n");
    let mut pieces: Vec<Piece> = parts.iter().flat_map(|part| splitter.push(part)).collect();
    pieces.extend(splitter.flush());
    let (mut thoughts, mut content, mut calls) = (String::new(), String::new(), Vec::new());
    for piece in pieces {
        match piece {
            Piece::Reasoning(text) => thoughts.push_str(&text),
            Piece::Content(text) => content.push_str(&text),
            Piece::Call(call) => calls.push((call.name, call.arguments)),
        }
    }
    (thoughts, content, calls)
}

#[test]
fn answers_of_every_family_cut_at_every_place() {
    for (template, answer, thoughts, content, calls) in CASES {
        let calls = calls.iter().map(|&(name, arguments)| (name.to_owned(), arguments.to_owned())).collect();
        let expected = (thoughts.to_owned(), content.to_owned(), calls);
        assert_eq!(split(template, &[answer]), expected, "{answer}");
        let places: Vec<usize> = answer.char_indices().map(|(at, _)| at).collect();
        for &at in &places {
            assert_eq!(split(template, &[&answer[..at], &answer[at..]]), expected, "{answer} cut at {at}");
        }
        let each: Vec<String> = answer.chars().map(String::from).collect();
        let each: Vec<&str> = each.iter().map(String::as_str).collect();
        assert_eq!(split(template, &each), expected, "{answer} in characters");
    }
}

/// Nothing that is thought or called is ever told as what is said, in whatever parts it comes.
#[test]
fn nothing_leaks_before_it_is_known() {
    let mut splitter = Splitter::new(&Marks::of("<tool_call><think>"), &TOOLS.map(str::to_owned), "");
    let answer = "<think>a</think>b<tool_call>{\"name\": \"now\"}</tool_call>";
    for (at, c) in answer.char_indices() {
        for piece in splitter.push(&c.to_string()) {
            match piece {
                Piece::Content(text) => assert_eq!(text, "b", "after {at}"),
                Piece::Reasoning(text) => assert_eq!(text, "a", "after {at}"),
                Piece::Call(call) => assert!(call.name == "now" && at + 1 == answer.len(), "after {at}"),
            }
        }
    }
}

#[test]
fn a_prompt_may_have_begun_the_thoughts() {
    let mut splitter = Splitter::new(&Marks::of("<think>"), &[], "assistant\n<think>\n");
    let mut pieces = splitter.push("hm</think>\n\nyes");
    pieces.extend(splitter.flush());
    assert_eq!(pieces, [Piece::Reasoning("hm".into()), Piece::Content("yes".into())]);
}

#[test]
fn a_call_whose_form_was_prescribed() {
    let mut splitter = Splitter::forced(&["now".to_owned()]);
    assert!(splitter.push("{\"name\": \"now\", \"argu").is_empty() && splitter.push("ments\": {}}").is_empty());
    assert_eq!(splitter.flush(), [Piece::Call(Call { name: "now".into(), arguments: "{}".into() })]);
    // One that was cut off is no call, and nothing of it is lost.
    let mut cut = Splitter::forced(&["now".to_owned()]);
    cut.push("{\"name\": \"no");
    assert_eq!(cut.flush(), [Piece::Content("{\"name\": \"no".into())]);
}

#[test]
fn without_tools_nothing_is_a_call() {
    let answer = "<tool_call>{\"name\": \"now\"}</tool_call>";
    let mut splitter = Splitter::new(&Marks::of("<tool_call>"), &[], "");
    let mut pieces = splitter.push(answer);
    pieces.extend(splitter.flush());
    let said: String =
        pieces.iter().map(|piece| if let Piece::Content(text) = piece { text.as_str() } else { "?" }).collect();
    assert_eq!(said, answer);
}
