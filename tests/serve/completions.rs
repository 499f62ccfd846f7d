//! `/v1/completions`, tokens of texts, and what a server says of itself.

use serde_json::{Value, json};

use crate::client::{Scripted, Setup};
use crate::script::VOCAB;

fn start() -> Scripted {
    Scripted::start(Setup::default())
}

fn texts(answer: &Value) -> Vec<&str> {
    answer["choices"].as_array().expect("choices").iter().map(|c| c["text"].as_str().expect("a text")).collect()
}

#[test]
fn prompts_in_every_form() {
    let server = start();
    let ids = |text: &str| server.tokenizer.encode(text).expect("ids");
    let prompt = "x [[naïve 🙂]]";
    let forms = [
        (json!(prompt), 1),
        (json!([prompt, "[[b]]", "[[]]"]), 3),
        (json!(ids(prompt)), 1),
        (json!([ids(prompt), ids("[[b]]")]), 2),
        (json!([prompt, ids("[[b]]")]), 2),
    ];
    for (form, count) in forms {
        let answer = server.ok("/v1/completions", &json!({ "prompt": form, "max_tokens": 50, "temperature": 0 }));
        assert_eq!(texts(&answer), ["naïve 🙂", "b", ""][..count], "{form}");
        for (i, choice) in answer["choices"].as_array().expect("choices").iter().enumerate() {
            assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(i), &json!("stop")));
        }
        assert_eq!(answer["object"], "text_completion");
        assert_eq!(answer["model"], "scripted");
    }
}

#[test]
fn tokens_are_counted_once_each() {
    let server = start();
    let usage = |body: Value| server.ok("/v1/completions", &body)["usage"].clone();
    // BOS and nine bytes; two bytes and the token that ends the text.
    let one = usage(json!({ "prompt": "use [[ab]]", "temperature": 0 }));
    let expected = json!({ "prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14,
        "prompt_tokens_details": { "cached_tokens": 0 } });
    assert_eq!(one, expected);
    let three = usage(json!({ "prompt": "other [[ab]]", "n": 3, "temperature": 0 }));
    assert_eq!((&three["prompt_tokens"], &three["completion_tokens"]), (&json!(13), &json!(9)));
    let again = usage(json!({ "prompt": "use [[ab]]", "temperature": 0 }));
    assert_eq!(again["prompt_tokens_details"]["cached_tokens"], 10, "all but the last token");
    let length = server.ok("/v1/completions", &json!({ "prompt": "x", "max_tokens": 5 }));
    assert_eq!(
        (&length["choices"][0]["text"], &length["choices"][0]["finish_reason"]),
        (&json!("aaaaa"), &json!("length"))
    );
    let default = server.ok("/v1/completions", &json!({ "prompt": "x" }));
    assert_eq!(default["usage"]["completion_tokens"], 16, "OpenAI's default");
}

#[test]
fn echo_tells_every_token_and_its_probability() {
    let server = start();
    let tokens = server.tokenizer.encode("[[b]]").expect("ids");
    let body = json!({ "prompt": [tokens.clone(), tokens], "echo": true, "logprobs": 1, "max_tokens": 1,
        "temperature": 0, "seed": 1 });
    let answer = server.ok("/v1/completions", &body);
    assert_eq!(answer["choices"].as_array().expect("choices").len(), 2);
    for choice in answer["choices"].as_array().expect("choices") {
        let told = &choice["logprobs"];
        assert_eq!(told["tokens"], json!(["<s>", "[", "[", "b", "]", "]", "b"]));
        assert_eq!(choice["text"], "<s>[[b]]b");
        assert_eq!(told["text_offset"], json!([0, 3, 4, 5, 6, 7, 8]));
        let (logprobs, top) = (&told["token_logprobs"], &told["top_logprobs"]);
        assert_eq!((&logprobs[0], &top[0]), (&Value::Null, &Value::Null), "nothing comes before the first");
        // The script says `b` with a logit of 20 against 0 of every other token.
        let likely = -((VOCAB as f64 - 1.0) * (-20f64).exp()).ln_1p();
        let last = logprobs[6].as_f64().expect("a number");
        assert!((last - likely).abs() < 1e-6, "{last}, {likely}");
        assert_eq!(top[6]["b"], logprobs[6], "the very same number");
        // Before that it says `a`: `[` is as unlikely as any other.
        let unlikely = logprobs[2].as_f64().expect("a number");
        assert!((unlikely - (likely - 20.0)).abs() < 1e-5, "{unlikely}");
        assert_eq!((&top[2]["a"], &top[2]["["]), (&logprobs[6], &logprobs[2]));
    }
    let scored = server.ok("/v1/completions", &json!({ "prompt": "ab", "echo": true, "logprobs": 0, "max_tokens": 0 }));
    assert_eq!(scored["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("numbers").len(), 3);
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    let plain = server.ok("/v1/completions", &json!({ "prompt": "[[c]]", "echo": true, "temperature": 0 }));
    assert_eq!((texts(&plain), &plain["choices"][0]["logprobs"]), (vec!["[[c]]c"], &Value::Null));
    let as_ids = json!({ "prompt": "[[c]]", "logprobs": 1, "return_tokens_as_token_ids": true, "temperature": 0 });
    let told = server.ok("/v1/completions", &as_ids);
    assert_eq!(told["choices"][0]["logprobs"]["tokens"], json!(["token_id:99"]));
}

#[test]
fn bytes_that_are_no_character_are_spelled() {
    let server = start();
    let body = json!({ "prompt": "[[é]]", "logprobs": 2, "temperature": 0 });
    let choice = &server.ok("/v1/completions", &body)["choices"][0];
    assert_eq!(choice["text"], "é");
    assert_eq!(choice["logprobs"]["tokens"], json!(["bytes:\\xc3", "bytes:\\xa9"]));
}

#[test]
fn streams_say_the_same_in_parts() {
    let server = start();
    let body = json!({ "prompt": ["[[naïve 🙂!]]", "[[b]]"], "n": 2, "temperature": 0, "stream": true,
        "stream_options": { "include_usage": true } });
    let chunks = server.stream("/v1/completions", &body);
    let mut said = vec![String::new(); 4];
    let mut ended = vec![Value::Null; 4];
    let (last, parts) = chunks.split_last().expect("chunks");
    for chunk in parts {
        let choice = &chunk["choices"][0];
        let i = choice["index"].as_u64().expect("an index") as usize;
        said[i].push_str(choice["text"].as_str().expect("a text"));
        assert!(!said[i].contains('\u{fffd}'), "{said:?}");
        assert_eq!((&ended[i], &chunk["usage"]), (&Value::Null, &Value::Null), "nothing follows the end");
        ended[i] = choice["finish_reason"].clone();
    }
    assert_eq!(said, ["naïve 🙂!", "naïve 🙂!", "b", "b"]);
    assert_eq!(ended, vec![json!("stop"); 4]);
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 2 * 13 + 2 * 2);
    let quiet = server.stream("/v1/completions", &json!({ "prompt": "[[b]]", "stream": true, "temperature": 0 }));
    assert!(quiet.iter().all(|chunk| chunk.get("usage").is_none()), "only when asked");
    let counted = json!({ "prompt": "[[bc]]", "stream": true, "temperature": 0,
        "stream_options": { "continuous_usage_stats": true } });
    let counts: Vec<_> =
        server.stream("/v1/completions", &counted).iter().map(|c| c["usage"]["completion_tokens"].clone()).collect();
    assert_eq!(counts, [1, 2, 3]);
}

#[test]
fn a_stop_text_is_never_seen() {
    let server = start();
    let run = |stop: Value, stream: bool| {
        let body =
            json!({ "prompt": "[[one END two]]", "stop": stop, "stream": stream, "temperature": 0, "max_tokens": 50 });
        if !stream {
            let choice = server.ok("/v1/completions", &body)["choices"][0].clone();
            return (choice["text"].as_str().expect("text").to_owned(), choice["stop_reason"].clone());
        }
        let chunks = server.stream("/v1/completions", &body);
        let text = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().expect("text")).collect();
        (text, chunks.last().expect("a chunk")["choices"][0]["stop_reason"].clone())
    };
    for stream in [false, true] {
        assert_eq!(run(json!("END"), stream), ("one ".into(), json!("END")));
        assert_eq!(run(json!(["two", " E"]), stream), ("one".into(), json!(" E")));
        // What only begins like a stop text comes out in the end.
        assert_eq!(run(json!("two!"), stream), ("one END two".into(), Value::Null));
        assert_eq!(run(json!([]), stream), ("one END two".into(), Value::Null));
    }
    let body = json!({ "prompt": "[[one]]", "stop_token_ids": [110], "temperature": 0 });
    let choice = &server.ok("/v1/completions", &body)["choices"][0];
    assert_eq!((&choice["text"], &choice["stop_reason"]), (&json!("o"), &json!(110)));
    let on = json!({ "prompt": "[[one]]", "ignore_eos": true, "max_tokens": 6, "temperature": 0 });
    assert_eq!(server.ok("/v1/completions", &on)["choices"][0]["finish_reason"], "length");
    let late = json!({ "prompt": "[[]]", "min_tokens": 3, "temperature": 0, "logit_bias": { "98": 5 } });
    assert_eq!(texts(&server.ok("/v1/completions", &late)), ["bbb"]);
}

#[test]
fn seeds_decide_and_answers_do_not_depend_on_the_rest() {
    let server = start();
    let run = |seed: u64, n: usize| {
        let body = json!({ "prompt": "RANDOM", "seed": seed, "n": n, "max_tokens": 12, "temperature": 1.5 });
        let answer = server.ok("/v1/completions", &body);
        texts(&answer).into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let alone = run(5, 1);
    let four = run(5, 4);
    assert_eq!(alone[0], four[0]);
    assert_eq!(run(6, 1)[0], four[1], "texts of one request have seeds one after another");
    assert_ne!(four[0], four[1]);
    let unseeded = |_| texts(&server.ok("/v1/completions", &json!({ "prompt": "RANDOM" })))[0].to_owned();
    assert_ne!(unseeded(0), unseeded(1), "nobody said that they should be alike");
    // The best of several is the most probable of the same texts.
    let body = json!({ "prompt": "RANDOM", "seed": 5, "n": 4, "max_tokens": 12, "temperature": 1.5, "logprobs": 0 });
    let all = server.ok("/v1/completions", &body);
    let mean = |choice: &Value| {
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().expect("numbers");
        logprobs.iter().map(|number| number.as_f64().expect("a number")).sum::<f64>()
    };
    let best = all["choices"].as_array().expect("choices").iter().max_by(|a, b| mean(a).total_cmp(&mean(b)));
    let body = json!({ "prompt": "RANDOM", "seed": 5, "best_of": 4, "max_tokens": 12, "temperature": 1.5 });
    let chosen = server.ok("/v1/completions", &body);
    assert_eq!(texts(&chosen), [best.expect("four")["text"].as_str().expect("a text")]);
    assert_eq!(chosen["usage"]["completion_tokens"], 48, "all were made");
}

#[test]
fn tokens_of_texts_and_back() {
    let server = start();
    let made = server.ok("/tokenize", &json!({ "prompt": "ab<|im_end|>" }));
    assert_eq!(made, json!({ "tokens": [256, 97, 98, 259], "count": 4, "max_model_len": 1000 }));
    let plain =
        server.ok("/tokenize", &json!({ "content": "ab", "add_special_tokens": false, "return_token_strs": true }));
    assert_eq!((&plain["tokens"], &plain["token_strs"]), (&json!([97, 98]), &json!(["a", "b"])));
    let chat = server.ok("/tokenize", &json!({ "messages": [{ "role": "user", "content": "a" }] }));
    let text = server.ok("/detokenize", &json!({ "tokens": chat["tokens"] }));
    assert_eq!(text["prompt"], "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
    let info = server.get("/tokenizer_info").json();
    assert_eq!((&info["eos_token"], &info["bos_token"]), (&json!("</s>"), &json!("<s>")));
    assert!(info["chat_template"].as_str().expect("a template").contains("im_start"));
}

/// Every field that says how a token is chosen changes the text as it should.
#[test]
fn fields_that_choose() {
    let server = start();
    let text = |more: Value| {
        let mut body = json!({ "prompt": "RANDOM", "seed": 3, "temperature": 1.0, "max_tokens": 20 });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        server.ok("/v1/completions", &body)["choices"][0]["text"].as_str().expect("text").to_owned()
    };
    let greedy = text(json!({ "temperature": 0 }));
    assert_ne!(text(json!({ "temperature": 90 })), greedy, "the most probable token is not the only one");
    for only_one in [json!({ "top_k": 1 }), json!({ "min_p": 1.0 }), json!({ "top_p": 0.0 })] {
        let mut more = only_one.clone();
        more["temperature"] = 90.into();
        assert_eq!(text(more), greedy, "{only_one}");
    }
    // What was there before is a hundredth as probable: no letter comes twice.
    let letters = text(json!({ "temperature": 0, "repetition_penalty": 100 }));
    let distinct: std::collections::BTreeSet<_> = letters.chars().collect();
    assert_eq!((letters.len(), distinct.len()), (20, 20), "{letters}");
    // An `a` is worth 20, and 2 less for each that was made: the twelfth is worth less than others, which have 0.
    let costs = |name: &str| text(json!({ "prompt": "x", "temperature": 0, name: 2 }));
    assert_eq!(costs("presence_penalty"), "a".repeat(20));
    let often = costs("frequency_penalty");
    assert!(often.starts_with(&"a".repeat(10)) && !often.starts_with(&"a".repeat(12)), "{often:?}");
}

#[test]
fn what_a_server_says_of_itself() {
    let server = start();
    assert_eq!(server.get("/health").json()["status"], "ok");
    assert_eq!(server.get("/version").json()["version"], env!("CARGO_PKG_VERSION"));
    let models = server.get("/v1/models").json();
    let first = &models["data"][0];
    assert_eq!(
        (&first["id"], &first["owned_by"], &first["max_model_len"]),
        (&json!("scripted"), &json!("decdec"), &json!(1000))
    );
    assert_eq!(models["data"][1]["id"], "alias");
    assert_eq!(server.get("/v1/models/alias").json()["root"], "scripted");
    assert_eq!(server.get("/v1/models/other").status, 404);
    server.ok("/v1/completions", &json!({ "prompt": "x", "max_tokens": 7, "temperature": 0 }));
    assert_eq!(server.metric("vllm:generation_tokens_total"), 7.0);
    assert_eq!(server.metric("vllm:time_to_first_token_seconds_count"), 1.0);
    assert_eq!(server.metric("vllm:request_success_total{model_name=\"scripted\",finished_reason=\"length\"}"), 1.0);
    // All tokens but the first are chosen behind one that was made, and is compensated.
    assert_eq!(server.metric("decdec_residual_bytes_total"), 600.0);
    let speed = server.get("/v1/loads").json()["loads"][0]["gen_throughput"].as_f64();
    assert!(speed.is_some_and(|speed| speed > 0.0 && speed <= 7.0), "{speed:?}");
    // An answer is sent before its slot is seen to be free.
    server.until("the slot is free", || server.busy() == 0);
    let load = &server.get("/v1/loads").json()["loads"][0];
    assert_eq!(
        (&load["num_running_reqs"], &load["num_waiting_reqs"], &load["max_running_requests"]),
        (&json!(0), &json!(0), &json!(4))
    );
    assert_eq!(server.get("/props").json()["total_slots"], 4);
}
