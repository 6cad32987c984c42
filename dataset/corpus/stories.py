"""What the assistant of the bundled corpus says of itself, its manners, stories and riddles, in English and Chinese."""

# Who the assistant is: kind of question -> (answer, reply, questions).
IDENTITY = {
    "en": {
        "name": (
            "nano-llada",
            "I am nano-llada, a small language model.",
            (
                "Who are you?",
                "What is your name?",
                "Please introduce yourself.",
                "What are you called?",
                "Tell me who you are.",
            ),
        ),
        "languages": (
            "English and Chinese",
            "I speak English and Chinese.",
            (
                "Which languages do you speak?",
                "What languages can you speak?",
                "What languages do you know?",
                "Do you speak Chinese?",
            ),
        ),
        "person": (
            "language model",
            "No, I am not a person. I am a language model.",
            ("Are you a person?", "Are you human?", "Are you a real person?", "Am I talking to a human?"),
        ),
        "skills": (
            "simple questions",
            "I can answer simple questions, do small sums and tell little stories.",
            ("What can you do?", "How can you help me?", "What are you good at?", "What can I ask you?"),
        ),
    },
    "zh": {
        "name": (
            "nano-llada",
            "我是nano-llada，一个小小的语言模型。",
            ("你是谁？", "你叫什么名字？", "请介绍一下你自己。", "请你做个自我介绍。", "怎么称呼你？"),
        ),
        "languages": (
            "中文和英文",
            "我会说中文和英文。",
            ("你会说什么语言？", "你会哪些语言？", "你懂哪几种语言？", "你会说英文吗？"),
        ),
        "person": (
            "语言模型",
            "不，我不是人，我是一个语言模型。",
            ("你是人吗？", "你是真人吗？", "你是人类吗？", "我在和真人聊天吗？"),
        ),
        "skills": (
            "简单的问题",
            "我可以回答简单的问题，做小算术，还会讲小故事。",
            ("你会做什么？", "你能帮我做什么？", "你有什么本领？", "我可以问你什么？"),
        ),
    },
}
OPENINGS = {
    "en": ("{}", "Hello! {}", "I have a question. {}", "Hi there. {}"),
    "zh": ("{}", "你好！{}", "我想问一个问题。{}", "请问，{}"),
}
GREETINGS = {
    "en": (("Hello!", "Hello! How can I help you?"), ("Good morning!", "Good morning! What would you like to know?")),
    "zh": (("你好！", "你好！有什么可以帮你的吗？"), ("早上好！", "早上好！你想知道什么？")),
}
STATEMENT_REQUESTS = {  # none says about what
    "en": ("Tell me something.", "Tell me a fact.", "Say something that is true.", "Teach me something."),
    "zh": ("跟我说点什么吧。", "告诉我一件事。", "说一句真话。", "教我一点知识吧。"),
}
THANKS = {"en": ("Thank you!", "You are welcome!"), "zh": ("谢谢你！", "不客气！")}

STORIES = {
    "en": (
        "{name} has a {pet}. One morning {he} takes it {to}. There they find {thing}. "
        "{name} laughs, and they carry it home together.",
        "It was a sunny day. {name} and {friend} walked {to}. {name} gave {friend} {thing}. "
        '"Thank you!" said {friend}. "You are a good friend."',
        '{name} could not find {his} {pet}. {friend} said, "I saw it {at}." {name} ran {to}. '
        "The {pet} was sitting there next to {thing}.",
        '{name} found {thing} {at}. {He} asked {friend}, "Is this yours?" "Yes, it is," said {friend}. '
        '"Thank you for asking!"',
        "It was raining, so {name} could not go {to}. {friend} came with {thing}, and they played at home. "
        "When the sun came out, they ran {to} together.",
        "A little {pet} lived {at}. It was hungry and alone. {name} gave it some bread. "
        "From then on, {name} and the {pet} were friends.",
    ),
    "zh": (
        "{name}有一只{pet}。一天早上，{he}带着{pet}去{place}，在那里捡到了{thing}。{name}笑了，他们一起把它带回了家。",
        "那天天气很好，{name}和{friend}一起去{place}玩。{name}送给{friend}{thing}。{friend}说：“谢谢，你真是我的好朋友！”",
        "{name}的{pet}不见了。{friend}说：“我在{at}看见过它。”{name}跑到{place}，看见{pet}正待在那里，旁边还有{thing}。",
        "{name}在{at}捡到了{thing}。{he}问{friend}：“这是你的吗？”{friend}说：“是我的，谢谢你！”",
        "下雨了，{name}不能去{place}了。{friend}带来了{thing}，两个人在家里玩。太阳出来以后，他们一起跑去了{place}。",
        "{at}有一只{pet}，它又饿又孤单。{name}给了它一点面包。从那以后，{name}和{pet}成了好朋友。",
    ),
}
STORY_REQUESTS = {
    "en": (
        "Tell me a short story about {name}.",
        "Can you tell me a story about {name}?",
        "I would like a story about {name}.",
    ),
    "zh": ("给我讲一个关于{name}的小故事。", "请讲一个{name}的故事。", "我想听{name}的故事。"),
}
SUM_STORIES = {
    "en": (
        "{name} has {a} {fruit}. {friend} gives {name} {b} more. Now {name} has {c} {fruit}.",
        "There are {a} {fruit} on the table. {name} brings {b} more, so there are {c}.",
    ),
    "zh": (
        "{name}有{a}{fruit}，{friend}又给了{name}{b}{rest}，现在{name}一共有{c}{fruit}。",
        "桌子上有{a}{fruit}，{name}又拿来{b}{rest}，这样就有{c}{fruit}了。",
    ),
}
READING = {
    "en": (
        ("{name} has {thing}. {friend} has {other}. What does {name} have?", "{name} has {thing}."),
        ("{friend} has {other}, and {name} has {thing}. What does {name} have?", "{name} has {thing}."),
        ("{name} found {thing} {at}. What did {name} find?", "{name} found {thing}."),
    ),
    "zh": (
        ("{name}有{thing}，{friend}有{other}。{name}有什么？", "{name}有{thing}。"),
        ("{friend}有{other}，{name}有{thing}。{name}有什么？", "{name}有{thing}。"),
        ("{name}在{at}捡到了{thing}。{name}捡到了什么？", "{name}捡到了{thing}。"),
    ),
}
