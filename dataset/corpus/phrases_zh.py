"""The Chinese sentences of the bundled corpus; see phrases.py."""

from dataset.corpus.phrases import Phrases, asked

ZH = {
    "capital": Phrases(
        ("{country}的首都是{city}。", "{country}首都的名字叫{city}。"),
        asked(
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
        asked(
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
        asked(
            "{thing}是{colour}的。",
            "{thing}是什么颜色的？",
            "{thing}的颜色是什么？",
            "{thing}是哪种颜色？",
            "你知道{thing}是什么颜色的吗？",
        ),
    ),
    "sound": Phrases(
        ("{animal}{sound}叫。", "听，{animal}正在{sound}叫呢。", "小朋友都知道，{animal}会{sound}叫。"),
        asked(
            "{animal}{sound}叫。",
            "{animal}怎么叫？",
            "{animal}是怎么叫的？",
            "{animal}的叫声是什么样的？",
            "你知道{animal}怎么叫吗？",
        ),
    ),
    "animal": Phrases(
        ("{sound}叫的动物是{animal}。",),
        asked(
            "{animal}{sound}叫。",
            "什么动物{sound}叫？",
            "哪种动物会{sound}叫？",
            "{sound}叫的是什么动物？",
            "你知道什么动物{sound}叫吗？",
        ),
    ),
    "legs": Phrases(
        ("{animal}有{legs}条腿。", "{animal}长着{legs}条腿。", "数一数，{animal}一共有{legs}条腿。"),
        asked(
            "{animal}有{legs}条腿。",
            "{animal}有几条腿？",
            "{animal}有多少条腿？",
            "{animal}长着几条腿？",
            "你知道{animal}有几条腿吗？",
        ),
    ),
    "home": Phrases(
        ("{animal}住在{home}。", "{animal}的家在{home}。", "在{home}可以找到{animal}。"),
        asked(
            "{animal}住在{home}。",
            "{animal}住在哪里？",
            "{animal}的家在哪里？",
            "在哪里可以找到{animal}？",
            "你知道{animal}住在什么地方吗？",
        ),
    ),
    "young": Phrases(
        ("{animal}的宝宝是{young}。", "{animal}的孩子叫{young}。", "{animal}小时候是{young}。"),
        asked(
            "{animal}的宝宝是{young}。",
            "{animal}的宝宝是什么？",
            "{animal}的宝宝叫什么？",
            "{animal}的孩子叫什么？",
            "你知道{animal}的宝宝叫什么吗？",
        ),
    ),
    "grown": Phrases(
        ("{young}长大后会变成{animal}。", "总有一天，{young}会长成{animal}。"),
        asked(
            "{young}长大后会变成{animal}。",
            "{young}长大后会变成什么？",
            "{young}长大以后是什么动物？",
            "{young}会长成什么？",
            "你知道{young}长大后变成什么吗？",
        ),
    ),
    "next": Phrases(
        ("{before}之后是{after}。", "{before}过了就是{after}。", "{before}后面跟着{after}。"),
        asked(
            "{before}之后是{after}。",
            "{before}之后是什么？",
            "{before}的后面是{unit}？",
            "{before}再往后是{unit}？",
            "{before}接下来是{unit}？",
        ),
    ),
    "previous": Phrases(
        ("{after}之前是{before}。", "{after}的前面是{before}。"),
        asked(
            "{after}之前是{before}。",
            "{after}之前是什么？",
            "{after}的前面是{unit}？",
            "{after}的前一个是{unit}？",
            "排在{after}前面的是{unit}？",
        ),
    ),
    "month": Phrases(
        ("一年的第{ordinal}个月是{month}。", "{month}是一年中的第{ordinal}个月。"),
        asked(
            "一年的第{ordinal}个月是{month}。",
            "一年的第{ordinal}个月是几月？",
            "一年中第{ordinal}个月叫什么？",
            "第{ordinal}个月是哪个月？",
            "你知道一年的第{ordinal}个月是几月吗？",
        ),
    ),
    "length": Phrases(
        ("{whole}有{number}{parts}。", "{whole}一共是{number}{parts}。"),
        asked(
            "{whole}有{number}{parts}。",
            "{whole}有多少{parts}？",
            "{whole}一共有多少{parts}？",
            "{whole}是多少{parts}？",
            "你知道{whole}有多少{parts}吗？",
        ),
    ),
    "opposite": Phrases(
        ("“{word}”的反义词是“{other}”。", "“{word}”和“{other}”是一对反义词。", "“{word}”的意思跟“{other}”相反。"),
        asked(
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
        asked(
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
        asked(
            "{a} - {b} = {c}。",
            "{a} - {b} 等于多少？",
            "{a}减{b}等于多少？",
            "{a}减去{b}还剩多少？",
            "{a} - {b} = ？",
        ),
    ),
    "product": Phrases(
        ("{a} × {b} = {c}。", "{a}乘{b}等于{c}。"),
        asked(
            "{a} × {b} = {c}。",
            "{a} × {b} 等于多少？",
            "{a}乘{b}等于多少？",
            "{a}乘以{b}是多少？",
            "{a} × {b} = ？",
        ),
    ),
    "numeral": Phrases(
        ("数字{digits}用汉字写作“{word}”。", "“{word}”就是数字{digits}。"),
        asked(
            "数字{digits}用汉字写作“{word}”。",
            "数字{digits}用汉字怎么写？",
            "{digits}的汉字怎么写？",
            "{digits}用汉字写作什么？",
            "你会用汉字写{digits}吗？",
        ),
    ),
    "chinese": Phrases(
        ("英语单词“{english}”的意思是“{chinese}”。", "“{english}”翻译成中文是“{chinese}”。"),
        asked(
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
        asked(
            "“{chinese}”的英文是“{english}”。",
            "“{chinese}”用英语怎么说？",
            "“{chinese}”的英文是什么？",
            "“{chinese}”翻译成英语是什么？",
            "英语里“{chinese}”怎么说？",
            "你知道“{chinese}”的英文吗？",
        ),
    ),
}
