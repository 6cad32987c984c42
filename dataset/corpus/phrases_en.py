"""The English sentences of the bundled corpus; see phrases.py."""

from dataset.corpus.phrases import Phrases, asked

EN = {
    "capital": Phrases(
        ("The capital of {country} is {city}.", "The capital city of {country} is called {city}."),
        asked(
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
        asked(
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
        asked(
            "{thing} is {colour}.",
            "What colour is {thing}?",
            "Which colour is {thing}?",
            "Do you know what colour {thing} is?",
            "What is the colour of {thing}?",
        ),
    ),
    "sound": Phrases(
        ("{one} {sound}.", "Listen! The {animal} {sound}.", "Every child knows that {one} {sound}."),
        asked(
            "{one} {sound}.",
            "What sound does {one} make?",
            "What noise does {one} make?",
            "How does {one} sound?",
            "Do you know what sound {one} makes?",
        ),
    ),
    "animal": Phrases(
        ("The animal that {sound} is {one}.",),
        asked(
            "{one} {sound}.",
            "Which animal {sound}?",
            "What animal {sound}?",
            "Do you know which animal {sound}?",
            "An animal {sound}. Which one is it?",
        ),
    ),
    "legs": Phrases(
        ("{one} has {legs} legs.", "{one} walks on {legs} legs.", "Count the legs of {one}: there are {legs}."),
        asked(
            "{one} has {legs} legs.",
            "How many legs does {one} have?",
            "How many legs has {one} got?",
            "On how many legs does {one} walk?",
            "Do you know how many legs {one} has?",
        ),
    ),
    "home": Phrases(
        ("{one} lives in {home}.", "The home of {one} is in {home}.", "You can find {one} in {home}."),
        asked(
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
        asked(
            "A young {animal} is called a {young}.",
            "What is a young {animal} called?",
            "What do you call a young {animal}?",
            "What is the name for a young {animal}?",
            "Do you know what a young {animal} is called?",
        ),
    ),
    "grown": Phrases(
        ("A {young} grows up to be {one}.", "One day the {young} will be {one}."),
        asked(
            "A {young} grows up to be {one}.",
            "What does a {young} grow up to be?",
            "What will a {young} be when it grows up?",
            "Which animal does a {young} become?",
            "What does a {young} turn into?",
        ),
    ),
    "next": Phrases(
        ("{after} comes after {before}.", "After {before} comes {after}.", "First comes {before}, and then {after}."),
        asked(
            "{after} comes after {before}.",
            "What comes after {before}?",
            "Which {unit} comes after {before}?",
            "Which {unit} follows {before}?",
            "What is the {unit} after {before}?",
        ),
    ),
    "previous": Phrases(
        ("{before} comes before {after}.", "Before {after} comes {before}."),
        asked(
            "{before} comes before {after}.",
            "What comes before {after}?",
            "Which {unit} comes before {after}?",
            "Which {unit} is just before {after}?",
            "What is the {unit} before {after}?",
        ),
    ),
    "month": Phrases(
        ("{month} is the {ordinal} month of the year.", "The {ordinal} month of the year is {month}."),
        asked(
            "The {ordinal} month of the year is {month}.",
            "What is the {ordinal} month of the year?",
            "Which month is the {ordinal} of the year?",
            "What is the {ordinal} month called?",
            "Can you name the {ordinal} month of the year?",
        ),
    ),
    "length": Phrases(
        ("There are {number} {parts} in {whole}.", "{whole} has {number} {parts}."),
        asked(
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
        asked(
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
        asked(
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
        asked(
            "{a} - {b} = {c}.",
            "What is {a} - {b}?",
            "How much is {a} - {b}?",
            "What is {a} minus {b}?",
            "{a} - {b} = ?",
        ),
    ),
    "product": Phrases(
        ("{a} × {b} = {c}.", "{a} times {b} equals {c}."),
        asked(
            "{a} × {b} = {c}.",
            "What is {a} × {b}?",
            "How much is {a} × {b}?",
            "What is {a} times {b}?",
            "{a} × {b} = ?",
        ),
    ),
    "numeral": Phrases(
        ('The number {digits} is written "{word}".', '"{word}" is the word for {digits}.'),
        asked(
            'The number {digits} is written "{word}".',
            "How do you write {digits} in words?",
            "What is {digits} in words?",
            "Which word stands for {digits}?",
            "Can you spell out the number {digits}?",
        ),
    ),
    "chinese": Phrases(
        ('The Chinese word for "{english}" is "{chinese}".', 'In Chinese, "{english}" is "{chinese}".'),
        asked(
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
        asked(
            '"{chinese}" means "{english}".',
            'What does "{chinese}" mean?',
            'What is "{chinese}" in English?',
            'What does the Chinese word "{chinese}" mean?',
            'Can you translate "{chinese}" into English?',
            'How do you say "{chinese}" in English?',
        ),
    ),
}
