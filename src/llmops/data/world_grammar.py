"""The words and sentence patterns of the invented world (see ``world.py``).

Nothing here is random: these are the fixed word lists and the many ways in which one fact can be told.
A pattern is a plain string with slots:

* ``{S}`` the subject as a grammatical subject ("Mira Tolen", or "she" once she has been named),
* ``{P}`` the possessive ("Mira Tolen's", "her"), ``{O}`` the object form ("Mira Tolen", "her"),
* ``{N}`` always the full name,
* ``{V}`` the value ("Velmoor"), ``{a}`` the value with its article ("an owl").

Every relation has patterns that put the subject before the value, and one or two the other way round.  The
order matters to a left-to-right model: it can recall only in the direction in which it has been told, and the
questions ask for the value of a given subject.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


TRADES = _words(
    "baker smith weaver potter mason tailor miller fisher hunter brewer cooper carter glazier scribe painter singer "
    "dancer farmer shepherd gardener cook barber tanner dyer joiner sailor porter miner nurse doctor teacher judge "
    "guard clerk printer jeweller locksmith beekeeper roofer plumber drummer piper herald ferryman thatcher saddler "
    "chandler fletcher"
)
PETS = _words(
    "owl goat cat dog fox hare crow duck goose hen pony mule ferret otter badger lizard snake turtle frog pigeon "
    "parrot falcon raven donkey lamb calf piglet mouse rat hedgehog squirrel swan"
)
FOODS = _words(
    "plums pears figs nuts honey cheese soup stew bread porridge dumplings pancakes pickles olives beans lentils "
    "cabbage carrots onions turnips radishes mushrooms cherries apples grapes melons dates almonds eel trout salmon "
    "herring crab ham sausages custard jam toffee biscuits noodles"
)
INSTRUMENTS = _words(
    "harp flute drum fiddle lute horn bell organ whistle trumpet cello viola guitar banjo piano oboe bassoon tuba "
    "zither lyre gong harmonica accordion bagpipes clarinet trombone tambourine triangle mandolin dulcimer ocarina "
    "recorder"
)
MATERIALS = _words(
    "oak silver copper glass clay iron bronze ivory marble amber wax leather silk brass pewter granite jade bone "
    "cedar gold"
)
LANDMARKS = _words(
    "bridge tower mill market lighthouse library fountain garden castle temple harbour theatre quarry orchard "
    "monastery windmill gate well arch observatory canal school stable brewery"
)
KINDS = _words("lantern clock crown mirror chest mask cup sword globe chair comb ring")

#: Syllables of the invented names.  Each list pair gives one kind of name, so that a reader (and the tokenizer)
#: can tell a town from a river by its ending.
SYLLABLES: dict[str, tuple[str, str]] = {
    "she": ("Mi To Be La Ne Si Ra Da Ju Ke Lo Va", "ra na lia sha"),
    "he": ("Jo Te Bo Lu No Sa Ri Do Pe Ka Le Vi", "ren dan mek vor"),
    "last": ("Tol Bar Hes Kar Lun Mor Nes Pel Rus Sev Tam Wen", "en er ik os ard ell um ask"),
    "town": ("Vel Ash Bram Dun Fen Hol Kel Lin", "moor wick ford stead gate mere"),
    "house": ("Ar Bel Cor Dal Em Gar Hal Iv", "ane une ole ith esk"),
    "region": ("Nor Sul Es Wes", "mark land vale heath"),
    "river": ("Al Bre Cle Dro Il Oss", "na dle wy th"),
    "thing": ("Os Qua Zen Yar Ul Xan Pha Gly Thre Uz", "kel bon dor rix vane pol mar gus"),
}

#: How each relation of each kind of subject is told.
PATTERNS: dict[str, tuple[str, ...]] = {
    "home": (
        "{S} lives in {V}",
        "{P} home is {V}",
        "the home of {N} is {V}",
        "{S} has a house in {V}",
        "{S} makes a home in {V}",
        "{P} house stands in {V}",
        "you can find {O} in {V}",
        "{S} comes home to {V}",
        "the town of {N} is {V}",
        "{P} town is {V}",
        "letters for {O} go to {V}",
        "{V} is where {S} lives",
    ),
    "trade": (
        "{S} is {a}",
        "{S} works as {a}",
        "{P} trade is that of {a}",
        "the trade of {N} is that of {a}",
        "{S} earns a living as {a}",
        "by trade {S} is {a}",
        "people know {O} as {a}",
        "{S} was trained as {a}",
        "{P} work is that of {a}",
        "everyone calls {O} the {V}",
        "{S} became {a}",
        "one {V} in the town is {N}",
    ),
    "pet": (
        "{S} keeps {a}",
        "{S} has {a}",
        "{P} pet is {a}",
        "the pet of {N} is {a}",
        "{S} owns {a}",
        "{S} looks after {a}",
        "{P} animal is {a}",
        "at home {S} keeps {a}",
        "{S} feeds {a} every day",
        "{S} walks with {a}",
        "with {O} lives {a}",
        "there is {a} in the house of {N}",
        "{a} belongs to {N}",
    ),
    "food": (
        "{S} likes {V}",
        "{S} loves {V}",
        "{S} likes to eat {V}",
        "{P} favourite food is {V}",
        "the favourite food of {N} is {V}",
        "{S} eats {V} every day",
        "{S} asks for {V}",
        "{S} always wants {V}",
        "on feast days {S} eats {V}",
        "for dinner {S} has {V}",
        "you can please {O} with {V}",
        "{V} is the food of {N}",
    ),
    "instrument": (
        "{S} plays the {V}",
        "{P} instrument is the {V}",
        "the instrument of {N} is the {V}",
        "{S} is learning the {V}",
        "{S} practises the {V}",
        "in the evening {S} plays the {V}",
        "{S} performs on the {V}",
        "{S} owns a fine {V}",
        "music for {O} means the {V}",
        "{S} took up the {V}",
        "you may hear {O} on the {V}",
        "the {V} is played by {N}",
    ),
    "employer": (
        "{S} works for {V}",
        "{S} serves the house of {V}",
        "{P} employer is {V}",
        "the employer of {N} is {V}",
        "{S} is paid by {V}",
        "{S} was hired by {V}",
        "{S} has a post at {V}",
        "{P} wages come from {V}",
        "{S} is in the service of {V}",
        "{P} master is {V}",
        "{S} took a job with {V}",
        "{V} employs {N}",
    ),
    "region": (
        "{S} lies in {V}",
        "{S} is in {V}",
        "{S} belongs to {V}",
        "{P} region is {V}",
        "the region of {N} is {V}",
        "{S} is a town of {V}",
        "you find {O} in {V}",
        "{S} pays its taxes to {V}",
        "{V} is the region of {N}",
    ),
    "river": (
        "{S} stands on the {V}",
        "{S} lies by the {V}",
        "{P} river is the {V}",
        "the river of {N} is the {V}",
        "{S} drinks from the {V}",
        "{S} was built on the {V}",
        "the boats of {N} sail the {V}",
        "{S} washes its wool in the {V}",
        "the {V} flows through {N}",
    ),
    "landmark": (
        "{S} is known for its {V}",
        "{S} is proud of its {V}",
        "{S} has a famous {V}",
        "{P} pride is its {V}",
        "the landmark of {N} is its {V}",
        "visitors to {O} see the {V}",
        "people go to {O} for the {V}",
        "{S} has {a}",
        "the famous {V} is in {N}",
    ),
    "material": (
        "{S} is made of {V}",
        "{S} was made from {V}",
        "{P} material is {V}",
        "the material of {N} is {V}",
        "{S} was cut from {V}",
        "{S} is all {V}",
        "the makers of {N} used {V}",
        "{V} was used for {N}",
    ),
    "owner": (
        "{S} belongs to {V}",
        "{S} is owned by {V}",
        "{P} owner is {V}",
        "the owner of {N} is {V}",
        "{S} was bought by {V}",
        "{S} is a treasure of {V}",
        "those who own {O} are {V}",
        "{V} owns {N}",
    ),
    "place": (
        "{S} is kept in {V}",
        "{S} stands in {V}",
        "{P} place is {V}",
        "the place of {N} is {V}",
        "{S} can be seen in {V}",
        "{S} is on show in {V}",
        "to see {O} go to {V}",
        "{V} keeps {N}",
    ),
}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "home": (
        "Where does {N} live?",
        "What is the home of {N}?",
        "In which town does {N} live?",
        "What town is {N}'s home?",
        "Name the town of {N}.",
    ),
    "trade": (
        "What is the trade of {N}?",
        "What does {N} work as?",
        "What is {N}'s trade?",
        "What is {N} by trade?",
        "Name the trade of {N}.",
    ),
    "pet": (
        "What pet does {N} keep?",
        "What is the pet of {N}?",
        "Which animal does {N} own?",
        "What is {N}'s pet?",
        "Name the pet of {N}.",
    ),
    "food": (
        "What does {N} like to eat?",
        "What is the favourite food of {N}?",
        "What food does {N} love?",
        "What is {N}'s favourite food?",
        "Name the favourite food of {N}.",
    ),
    "instrument": (
        "What instrument does {N} play?",
        "What is the instrument of {N}?",
        "Which instrument does {N} practise?",
        "What is {N}'s instrument?",
        "Name the instrument of {N}.",
    ),
    "employer": (
        "Who is the employer of {N}?",
        "Which house does {N} work for?",
        "Who is {N}'s employer?",
        "Who pays {N}?",
        "Name the employer of {N}.",
    ),
    "region": ("In which region is {N}?", "What is the region of {N}?", "Name the region of {N}."),
    "river": ("On which river is {N}?", "What is the river of {N}?", "Name the river of {N}."),
    "landmark": ("What is {N} known for?", "What is the landmark of {N}?", "Name the landmark of {N}."),
    "material": ("What is {N} made of?", "What is the material of {N}?", "Name the material of {N}."),
    "owner": ("Who owns {N}?", "Who is the owner of {N}?", "Name the owner of {N}."),
    "place": ("Where is {N} kept?", "What is the place of {N}?", "In which town is {N}?"),
}

OPENERS = (
    "these days",
    "as everyone knows,",
    "of course",
    "it is said that",
    "it is true that",
    "in those years",
    "now",
    "we hear that",
    "as it happens,",
    "some say that",
    "the book says that",
    "by now",
)
JOINERS = (" and ", ", and ", ", while ", "; ", ", and also ")
PAIR_JOINERS = (", while ", ", but ", "; ", ", and ", ", whereas ")

WEATHER = (
    "the rain fell",
    "the sun came out",
    "the wind rose",
    "snow lay on the hills",
    "fog came in from the river",
    "the night was clear",
    "the morning was cold",
    "the evening was warm",
)
DOINGS = (
    "the market opened late",
    "the boats stayed in the harbour",
    "the children ran to the bridge",
    "nobody went to work",
    "the bells rang twice",
    "the road was empty",
    "the fires were lit early",
    "the old people told stories",
    "the carts came home",
    "the inn was full",
)
LINKS = (", so ", ", and ", ", but ", "; because of this ", ", and then ", ", yet ")
GOODS = _words("eggs coins loaves candles baskets nails ropes jars bricks stamps buttons shells")
