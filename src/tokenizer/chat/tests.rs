use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Chat, Message};

fn render(template: &str, messages: &[Message]) -> anyhow::Result<String> {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
    Chat::new(template, tokens.map(|(name, token)| (name.into(), token.into())).to_vec()).render(messages, true)
}

/// What transformers made of each feature: `tests/data/chat/make.py`.
#[test]
fn templates_mean_what_they_mean_to_transformers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/chat/features.json");
    let known: Value = serde_json::from_slice(&std::fs::read(path).expect("readable")).expect("JSON");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let turns = known["conversation"].as_array().expect("turns").iter();
    let messages: Vec<Message> = turns.map(|t| Message::new(&text(&t[0]), &text(&t[1]))).collect();
    let features = known["features"].as_array().expect("a list");
    assert!(features.len() > 60, "{}", features.len());
    let wrong: Vec<String> = features
        .iter()
        .filter_map(|feature| {
            let (template, wanted) = (text(&feature[0]), text(&feature[1]));
            let got = render(&template, &messages).unwrap_or_else(|e| e.to_string());
            (got != wanted).then(|| format!("{template:?}\n  is     {got:?}\n  wanted {wanted:?}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Templates that would take all memory, all time or all of the stack, and what is said instead.
#[test]
fn a_template_takes_no_more_than_it_may() {
    let megabyte = "x".repeat(1 << 20);
    let large = "a value takes more than 4194304 bytes";
    let deep = "a value nests deeper than 64 levels";
    let written = "the chat template writes more than 4194304 bytes";
    let long = "it takes too many steps";
    let wide = "expressions write more than 67108864 bytes";
    let looped =
        |body: &str| format!("{{% set ns = namespace(x='ab') %}}{{% for i in range(99999) %}}{body}{{% endfor %}}");
    let cases: Vec<(String, &str)> = vec![
        (format!("{{% for i in range(100000) %}}{megabyte}{{% endfor %}}"), written),
        (format!("{{% set x %}}{{% for i in range(100000) %}}{megabyte}{{% endfor %}}{{% endset %}}"), long),
        ("{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}".into(), written),
        ("{% set x %}{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}".into(), wide),
        ("{{ 'a' * 10**9 }}".into(), large),
        ("{{ 'a' * 9999999 }}".into(), large),
        ("{{ ('a' * 99999) * 99999 }}".into(), large),
        ("{{ ([0] * 9999999) | list | length }}".into(), large),
        ("{{ (0,) * 99999999 }}".into(), large),
        ("{{ 10**18 * [0] }}".into(), large),
        ("{% set x = [0] * 9999999 %}{{ x | list | length }}".into(), large),
        (looped("{% set ns.x = ns.x ~ ns.x %}"), large),
        (looped("{% set ns.x = ns.x + ns.x %}"), large),
        (looped("{% set ns.x = [ns.x, ns.x] %}"), large),
        (looped("{% set ns.x = (ns.x, ns.x) %}"), large),
        (looped("{% set ns.x = {'a': ns.x, 'b': ns.x} %}"), large),
        (looped("{% set ns.x = ns.x.replace('a', ns.x) %}"), large),
        (looped("{% set ns.x = ns.x | replace('a', ns.x) %}"), large),
        (looped("{% set ns.x = [ns.x, ns.x] | join(ns.x) %}"), large),
        (looped("{% set ns.x = '%s%s' % (ns.x, ns.x) %}"), large),
        (looped("{% set ns.x = '{0}{0}'.format(ns.x) %}"), large),
        (looped("{% set ns.x = '%s%s' | format(ns.x, ns.x) %}"), large),
        (looped("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"), large),
        ("{% macro m(s) %}{{ m(s ~ s) }}{% endmacro %}{{ m('ab') }}".into(), large),
        (looped("{% set ns.x = [ns.x] %}"), deep),
        (looped("{% set ns.x = (ns.x,) %}"), deep),
        (looped("{% set ns.x = dict(x=ns.x) %}"), deep),
        (looped("{% set ns.x = namespace(x=ns.x) %}"), deep),
        (looped("{% set n = namespace() %}{% set n.x = ns.x %}{% set ns.x = n %}"), deep),
        ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}".into(), deep),
        ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | tojson }}".into(), deep),
        ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | string }}".into(), deep),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(), "recursion limit exceeded"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}".into(), long),
        ("{{ 'x' | indent(10**12) }}".into(), large),
        ("{{ ('x\n' * 9999) | indent(9999) }}".into(), large),
        ("{{ '%1000000000d' % 1 }}".into(), large),
        ("{{ '{:>1000000000}'.format(1) }}".into(), large),
        ("{{ '%1000000000d' | format(1) }}".into(), large),
        ("{{ 'x'.ljust(10**12) }}{{ 'x'.center(10**12) }}".into(), large),
        ("{{ [1] | batch(10**9, 0) | list }}".into(), large),
        ("{{ [1] | slice(10**9) | list }}".into(), large),
        (
            format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)),
            "template exceeds maximum recursion limits",
        ),
        (
            format!("{}{}", "{% if true %}".repeat(100_000), "{% endif %}".repeat(100_000)),
            "template exceeds maximum recursion limits",
        ),
    ];
    for (template, expected) in cases {
        let started = Instant::now();
        let error = render(&template, &[]).expect_err("it takes too much").to_string();
        let shown: String = template.chars().take(80).collect();
        assert!(error.ends_with(expected) && !error.contains('\n'), "{shown}: {error}");
        assert!(started.elapsed() < Duration::from_secs(20), "{shown}: {:?}", started.elapsed());
    }
}

#[test]
fn a_template_that_takes_too_long_is_left_behind() {
    // Each step takes long, so that counting steps does not help.
    let slow = "{% set x = 'a' * 4000000 %}{% for i in range(500) %}{% if x[1:] == '' %}{% endif %}{% endfor %}";
    let started = Instant::now();
    let error = Chat::new(slow, vec![]).render_within(Duration::from_millis(50), &[], true).expect_err("it is slow");
    assert_eq!(error.to_string(), "the chat template takes more than 0.05 s");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[test]
fn a_template_takes_what_it_needs() {
    let content = "words and words\n".repeat(100_000);
    let messages: Vec<Message> =
        (0..1000).map(|i| Message::new(if i % 2 == 0 { "user" } else { "assistant" }, "Hello?")).collect();
    let template = "{% for m in messages %}\
        {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}\
        {{ '<' ~ m.role + '>' + m.content | trim ~ eos_token }}{% endfor %}";
    assert_eq!(render(template, &messages).expect("a thousand messages").len(), 500 * (6 + 11 + 2 * 10));
    let nested = format!("{{{{ {}1{} }}}}", "[".repeat(20), "]".repeat(20));
    assert_eq!(render(&nested, &[]).expect("lists in lists").len(), 41);
    let long = render(template, &[Message::new("user", &content)]).expect("a long message");
    assert_eq!(long.len(), content.len() - 1 + 6 + 4);
}

#[test]
fn errors_are_one_line() {
    let mut wrong = Vec::new();
    for (template, expected) in [
        ("\n{{ raise_exception('roles must\nalternate') }}", "the chat template fails in line 2: roles must alternate"),
        ("{% for %}", "the chat template fails in line 1: unexpected end of block, expected in"),
        ("a\r\nb\rc\n{{ nothing() }}", "the chat template fails in line 4: nothing is unknown"),
        ("{{ 'a' | unheard }}", "the chat template fails in line 1: filter unheard is unknown"),
        ("{{ 'a'.unheard() }}", "the chat template fails in line 1: string has no method named unheard"),
        ("{% include 'x' %}", "the chat template fails in line 1: tried to include non-existing template 'x'"),
        ("{% generation %}", "the chat template fails in line 1: unexpected end of input, expected end of block"),
        ("{{ 1 % 0 }}", "the chat template fails in line 1: unable to calculate 1 % 0"),
        (
            "{{ none % 2 }}",
            "the chat template fails in line 1: tried to use % operator on unsupported types none and number",
        ),
        (
            "{{ 'a' + 1 }}",
            "the chat template fails in line 1: tried to use + operator on unsupported types string and number",
        ),
        ("{{ debug() }}", "the chat template fails in line 1: debug is unknown"),
        ("{{ 'a'.index('b') }}", "the chat template fails in line 1: substring not found"),
        ("{{ 'a'.split('') }}", "the chat template fails in line 1: empty separator"),
        ("{{ [1] | tojson(separators=[1]) }}", "the chat template fails in line 1: separators are two texts"),
    ] {
        match render(template, &[]).map_err(|e| e.to_string()) {
            Err(error) if error == expected => (),
            other => wrong.push(format!("{template:?}\n  is     {other:?}\n  wanted {expected:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let content = "x".repeat((4 << 20) + 1);
    let error = render("", &[Message::new("user", &content)]).expect_err("too long").to_string();
    assert_eq!(error, "the messages of a chat have 4194305 bytes, at most 4194304 are allowed");
    let long = render(&format!("{{{{ raise_exception('{}') }}}}", "long ".repeat(10_000)), &[]).expect_err("it fails");
    assert_eq!(long.to_string().len(), "the chat template fails in line 1: ".len() + 300);
}
