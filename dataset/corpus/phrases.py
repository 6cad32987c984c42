"""How the bundled corpus says things: statements, and questions with their replies, in English and Chinese.

Fields in braces are filled from a fact's own; the first letter of an English sentence is made a capital afterwards.
"""

from typing import NamedTuple


class Phrases(NamedTuple):
    statements: tuple[str, ...]
    exchanges: tuple[tuple[str, str], ...]  # (question, reply)


def _asked(reply: str, *questions: str) -> tuple[tuple[str, str], ...]:
    """Several ways of asking for the same reply."""
    return tuple((question, reply) for question in questions)


EN = {
    "capital": Phrases(
        ("The capital of {country} is {city}.", "The capital city of {country} is called {city}."),
        _asked(
            "{city} is the capital of {country}.",
            "What is the capital of {country}?",
            "Which city is the capital of {country}?",
            "Can you name the capital of {country}?",
            "What is the capital city of {country} called?",
            "Do you know the capital of {country}?",
        ),
    ),
    "country": Phrases(
        (
            "{city} is the capital of {country}.",
            "{city} is the capital city of {country}.",
            "The city of {city} is the capital of {country}.",
            "We are in {city}, the capital of {country}.",
        ),
        _asked(
            "{city} is the capital of {country}.",
            "Which country is {city} the capital of?",
            "{city} is the capital of which country?",
            "Of which country is {city} the capital?",
            "What country has {city} as its capital?",
            "Do you know which country {city} is the capital of?",
        ),
    ),
    "colour": Phrases(
        ("{thing} is {colour}.", "Everyone can see that {thing} is {colour}.", "The colour of {thing} is {colour}."),
        _asked(
            "{thing} is {colour}.",
            "What colour is {thing}?",
            "Which colour is {thing}?",
            "Do you know what colour {thing} is?",
            "What is the colour of {thing}?",
        ),
    ),
    "sound": Phrases(
        ("{one} {sound}.", "Listen! The {animal} {sound}.", "Every child knows that {one} {sound}."),
        _asked(
            "{one} {sound}.",
            "What sound does {one} make?",
            "What noise does {one} make?",
            "How does {one} sound?",
            "Do you know what sound {one} makes?",
        ),
    ),
    "animal": Phrases(
        ("The animal that {sound} is {one}.",),
        _asked(
            "{one} {sound}.",
            "Which animal {sound}?",
            "What animal {sound}?",
            "Do you know which animal {sound}?",
            "An animal {sound}. Which one is it?",
        ),
    ),
    "legs": Phrases(
        ("{one} has {legs} legs.", "{one} walks on {legs} legs.", "Count the legs of {one}: there are {legs}."),
        _asked(
            "{one} has {legs} legs.",
            "How many legs does {one} have?",
            "How many legs has {one} got?",
            "On how many legs does {one} walk?",
            "Do you know how many legs {one} has?",
        ),
    ),
    "home": Phrases(
        ("{one} lives in {home}.", "The home of {one} is in {home}.", "You can find {one} in {home}."),
        _asked(
            "{one} lives in {home}.",
            "Where does {one} live?",
            "Where is the home of {one}?",
            "Where can you find {one}?",
            "Do you know where {one} lives?",
        ),
    ),
    "young": Phrases(
        (
            "A young {animal} is called a {young}.",
            "A {young} is a young {animal}.",
            "When it is small, {one} is a {young}.",
        ),
        _asked(
            "A young {animal} is called a {young}.",
            "What is a young {animal} called?",
            "What do you call a young {animal}?",
            "What is the name for a young {animal}?",
            "Do you know what a young {animal} is called?",
        ),
    ),
    "grown": Phrases(
        ("A {young} grows up to be {one}.", "One day the {young} will be {one}."),
        _asked(
            "A {young} grows up to be {one}.",
            "What does a {young} grow up to be?",
            "What will a {young} be when it grows up?",
            "Which animal does a {young} become?",
            "What does a {young} turn into?",
        ),
    ),
    "next": Phrases(
        ("{after} comes after {before}.", "After {before} comes {after}.", "First comes {before}, and then {after}."),
        _asked(
            "{after} comes after {before}.",
            "What comes after {before}?",
            "Which {unit} comes after {before}?",
            "Which {unit} follows {before}?",
            "What is the {unit} after {before}?",
        ),
    ),
    "previous": Phrases(
        ("{before} comes before {after}.", "Before {after} comes {before}."),
        _asked(
            "{before} comes before {after}.",
            "What comes before {after}?",
            "Which {unit} comes before {after}?",
            "Which {unit} is just before {after}?",
            "What is the {unit} before {after}?",
        ),
    ),
    "month": Phrases(
        ("{month} is the {ordinal} month of the year.", "The {ordinal} month of the year is {month}."),
        _asked(
            "The {ordinal} month of the year is {month}.",
            "What is the {ordinal} month of the year?",
            "Which month is the {ordinal} of the year?",
            "What is the {ordinal} month called?",
            "Can you name the {ordinal} month of the year?",
        ),
    ),
    "length": Phrases(
        ("There are {number} {parts} in {whole}.", "{whole} has {number} {parts}."),
        _asked(
            "{whole} has {number} {parts}.",
            "How many {parts} are there in {whole}?",
            "How many {parts} does {whole} have?",
            "{whole} has how many {parts}?",
            "Do you know how many {parts} {whole} has?",
        ),
    ),
    "opposite": Phrases(
        (
            'The opposite of "{word}" is "{other}".',
            '"{word}" and "{other}" are opposites.',
            'If it is not "{word}", it may be "{other}".',
        ),
        _asked(
            'The opposite of "{word}" is "{other}".',
            'What is the opposite of "{word}"?',
            'Which word is the opposite of "{word}"?',
            'Can you name the opposite of "{word}"?',
            'Which word means the opposite of "{word}"?',
            'What is the antonym of "{word}"?',
        ),
    ),
    "sum": Phrases(
        ("{a} + {b} = {c}.", "{a} plus {b} equals {c}.", "{a} and {b} make {c}."),
        _asked(
            "{a} + {b} = {c}.",
            "What is {a} + {b}?",
            "How much is {a} + {b}?",
            "What is {a} plus {b}?",
            "{a} + {b} = ?",
            "What do {a} and {b} make?",
        ),
    ),
    "difference": Phrases(
        ("{a} - {b} = {c}.", "{a} minus {b} equals {c}.", "Take {b} away from {a}, and {c} is left."),
        _asked(
            "{a} - {b} = {c}.",
            "What is {a} - {b}?",
            "How much is {a} - {b}?",
            "What is {a} minus {b}?",
            "{a} - {b} = ?",
        ),
    ),
    "product": Phrases(
        ("{a} × {b} = {c}.", "{a} times {b} equals {c}."),
        _asked(
            "{a} × {b} = {c}.",
            "What is {a} × {b}?",
            "How much is {a} × {b}?",
            "What is {a} times {b}?",
            "{a} × {b} = ?",
        ),
    ),
    "numeral": Phrases(
        ('The number {digits} is written "{word}".', '"{word}" is the word for {digits}.'),
        _asked(
            'The number {digits} is written "{word}".',
            "How do you write {digits} in words?",
            "What is {digits} in words?",
            "Which word stands for {digits}?",
            "Can you spell out the number {digits}?",
        ),
    ),
    "chinese": Phrases(
        ('The Chinese word for "{english}" is "{chinese}".', 'In Chinese, "{english}" is "{chinese}".'),
        _asked(
            'In Chinese, "{english}" is "{chinese}".',
            'How do you say "{english}" in Chinese?',
            'What is "{english}" in Chinese?',
            'What is the Chinese word for "{english}"?',
            'Can you translate "{english}" into Chinese?',
            'Which Chinese word means "{english}"?',
        ),
    ),
    "english": Phrases(
        ('The Chinese word "{chinese}" means "{english}".', '"{chinese}" means "{english}" in English.'),
        _asked(
            '"{chinese}" means "{english}".',
            'What does "{chinese}" mean?',
            'What is "{chinese}" in English?',
            'What does the Chinese word "{chinese}" mean?',
            'Can you translate "{chinese}" into English?',
            'How do you say "{chinese}" in English?',
        ),
    ),
}

ZH = {
    "capital": Phrases(
        ("{country}的首都是{city}。", "{country}首都的名字叫{city}。"),
        _asked(
            "{city}是{country}的首都。",
            "{country}的首都是哪里？",
            "{country}的首都是哪座城市？",
            "哪座城市是{country}的首都？",
            "{country}的首都叫什么？",
            "你知道{country}的首都在哪里吗？",
        ),
    ),
    "country": Phrases(
        (
            "{city}是{country}的首都。",
            "{city}这座城市是{country}的首都。",
            "我们到了{city}，它是{country}的首都。",
            "大家都知道，{city}是{country}的首都。",
        ),
        _asked(
            "{city}是{country}的首都。",
            "{city}是哪个国家的首都？",
            "{city}是哪国的首都？",
            "哪个国家的首都是{city}？",
            "哪个国家把{city}作为首都？",
            "你知道{city}是哪个国家的首都吗？",
        ),
    ),
    "colour": Phrases(
        ("{thing}是{colour}的。", "大家都知道，{thing}是{colour}的。", "{thing}的颜色是{colour}。"),
        _asked(
            "{thing}是{colour}的。",
            "{thing}是什么颜色的？",
            "{thing}的颜色是什么？",
            "{thing}是哪种颜色？",
            "你知道{thing}是什么颜色的吗？",
        ),
    ),
    "sound": Phrases(
        ("{animal}{sound}叫。", "听，{animal}正在{sound}叫呢。", "小朋友都知道，{animal}会{sound}叫。"),
        _asked(
            "{animal}{sound}叫。",
            "{animal}怎么叫？",
            "{animal}是怎么叫的？",
            "{animal}的叫声是什么样的？",
            "你知道{animal}怎么叫吗？",
        ),
    ),
    "animal": Phrases(
        ("{sound}叫的动物是{animal}。",),
        _asked(
            "{animal}{sound}叫。",
            "什么动物{sound}叫？",
            "哪种动物会{sound}叫？",
            "{sound}叫的是什么动物？",
            "你知道什么动物{sound}叫吗？",
        ),
    ),
    "legs": Phrases(
        ("{animal}有{legs}条腿。", "{animal}长着{legs}条腿。", "数一数，{animal}一共有{legs}条腿。"),
        _asked(
            "{animal}有{legs}条腿。",
            "{animal}有几条腿？",
            "{animal}有多少条腿？",
            "{animal}长着几条腿？",
            "你知道{animal}有几条腿吗？",
        ),
    ),
    "home": Phrases(
        ("{animal}住在{home}。", "{animal}的家在{home}。", "在{home}可以找到{animal}。"),
        _asked(
            "{animal}住在{home}。",
            "{animal}住在哪里？",
            "{animal}的家在哪里？",
            "在哪里可以找到{animal}？",
            "你知道{animal}住在什么地方吗？",
        ),
    ),
    "young": Phrases(
        ("{animal}的宝宝是{young}。", "{animal}的孩子叫{young}。", "{animal}小时候是{young}。"),
        _asked(
            "{animal}的宝宝是{young}。",
            "{animal}的宝宝是什么？",
            "{animal}的宝宝叫什么？",
            "{animal}的孩子叫什么？",
            "你知道{animal}的宝宝叫什么吗？",
        ),
    ),
    "grown": Phrases(
        ("{young}长大后会变成{animal}。", "总有一天，{young}会长成{animal}。"),
        _asked(
            "{young}长大后会变成{animal}。",
            "{young}长大后会变成什么？",
            "{young}长大以后是什么动物？",
            "{young}会长成什么？",
            "你知道{young}长大后变成什么吗？",
        ),
    ),
    "next": Phrases(
        ("{before}之后是{after}。", "{before}过了就是{after}。", "{before}后面跟着{after}。"),
        _asked(
            "{before}之后是{after}。",
            "{before}之后是什么？",
            "{before}的后面是{unit}？",
            "{before}再往后是{unit}？",
            "{before}接下来是{unit}？",
        ),
    ),
    "previous": Phrases(
        ("{after}之前是{before}。", "{after}的前面是{before}。"),
        _asked(
            "{after}之前是{before}。",
            "{after}之前是什么？",
            "{after}的前面是{unit}？",
            "{after}的前一个是{unit}？",
            "排在{after}前面的是{unit}？",
        ),
    ),
    "month": Phrases(
        ("一年的第{ordinal}个月是{month}。", "{month}是一年中的第{ordinal}个月。"),
        _asked(
            "一年的第{ordinal}个月是{month}。",
            "一年的第{ordinal}个月是几月？",
            "一年中第{ordinal}个月叫什么？",
            "第{ordinal}个月是哪个月？",
            "你知道一年的第{ordinal}个月是几月吗？",
        ),
    ),
    "length": Phrases(
        ("{whole}有{number}{parts}。", "{whole}一共是{number}{parts}。"),
        _asked(
            "{whole}有{number}{parts}。",
            "{whole}有多少{parts}？",
            "{whole}一共有多少{parts}？",
            "{whole}是多少{parts}？",
            "你知道{whole}有多少{parts}吗？",
        ),
    ),
    "opposite": Phrases(
        ("“{word}”的反义词是“{other}”。", "“{word}”和“{other}”是一对反义词。", "“{word}”的意思跟“{other}”相反。"),
        _asked(
            "“{word}”的反义词是“{other}”。",
            "“{word}”的反义词是什么？",
            "“{word}”的反义词是哪个词？",
            "哪个词和“{word}”的意思相反？",
            "跟“{word}”意思相反的词是什么？",
            "你知道“{word}”的反义词吗？",
        ),
    ),
    "sum": Phrases(
        ("{a} + {b} = {c}。", "{a}加{b}等于{c}。", "{a}加上{b}，一共是{c}。"),
        _asked(
            "{a} + {b} = {c}。",
            "{a} + {b} 等于多少？",
            "{a}加{b}等于多少？",
            "{a}加{b}等于几？",
            "{a} + {b} = ？",
            "{a}加上{b}是多少？",
        ),
    ),
    "difference": Phrases(
        ("{a} - {b} = {c}。", "{a}减{b}等于{c}。", "从{a}里拿走{b}，还剩{c}。"),
        _asked(
            "{a} - {b} = {c}。",
            "{a} - {b} 等于多少？",
            "{a}减{b}等于多少？",
            "{a}减去{b}还剩多少？",
            "{a} - {b} = ？",
        ),
    ),
    "product": Phrases(
        ("{a} × {b} = {c}。", "{a}乘{b}等于{c}。"),
        _asked(
            "{a} × {b} = {c}。",
            "{a} × {b} 等于多少？",
            "{a}乘{b}等于多少？",
            "{a}乘以{b}是多少？",
            "{a} × {b} = ？",
        ),
    ),
    "numeral": Phrases(
        ("数字{digits}用汉字写作“{word}”。", "“{word}”就是数字{digits}。"),
        _asked(
            "数字{digits}用汉字写作“{word}”。",
            "数字{digits}用汉字怎么写？",
            "{digits}的汉字怎么写？",
            "{digits}用汉字写作什么？",
            "你会用汉字写{digits}吗？",
        ),
    ),
    "chinese": Phrases(
        ("英语单词“{english}”的意思是“{chinese}”。", "“{english}”翻译成中文是“{chinese}”。"),
        _asked(
            "“{english}”的意思是“{chinese}”。",
            "“{english}”是什么意思？",
            "“{english}”用中文怎么说？",
            "“{english}”翻译成中文是什么？",
            "英语里的“{english}”是什么意思？",
            "你知道“{english}”的中文意思吗？",
        ),
    ),
    "english": Phrases(
        ("“{chinese}”用英语说是“{english}”。", "“{chinese}”的英文是“{english}”。"),
        _asked(
            "“{chinese}”的英文是“{english}”。",
            "“{chinese}”用英语怎么说？",
            "“{chinese}”的英文是什么？",
            "“{chinese}”翻译成英语是什么？",
            "英语里“{chinese}”怎么说？",
            "你知道“{chinese}”的英文吗？",
        ),
    ),
}
PHRASES = {"en": EN, "zh": ZH}
