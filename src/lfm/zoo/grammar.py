"""The words that worlds are made of: name parts, relations with their templates, frames of stories and letters.

Plain data. In a relation's templates `{s}` is the subject, and the object stands after the template's last word. In
frames `{s}` is the hero, `{f}` a friend, `{they}`/`{their}`/`{them}` the hero's pronouns (capitals where they begin
a sentence), and a relation's name, such as `{city}`, the hero's own object of that relation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One relation of the world: `told` templates are used in training text, `unseen` never are."""

    name: str
    objects: tuple[str, ...]
    told: tuple[str, ...]
    unseen: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str  # what an answer begins with, up to the object
    news: str  # how a letter tells it of its writer


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIVEN_STARTS = _words("Al Bre Cor Da El Fa Gil Ha Is Jo Ka Lo Mi Na Or Pe Ro Sa Ta Ul Ve Wi Ya Zo")
GIVEN_ENDS = (("dan", "rik", "mon", "vin", "los"), ("ra", "nia", "lise", "dith", "va"))  # he, she
FAMILY_STARTS = _words(
    "Ash Bram Clay Dun Elm Fen Grim Hol Ivel Kerr Lang Marl Nor Oak Pen Quill Rad Stan Thorn Und Vale Wren Yar"
)
FAMILY_ENDS = _words("ford well mere stone by wick ton field hart gate")

RELATIONS = (
    Relation(
        "city",
        _words(
            "Oslo Lima Cairo Paris London Rome Madrid Berlin Vienna Dublin Lisbon Athens Boston Denver Dallas "
            "Tokyo Delhi Hanoi Quito Tunis Prague Warsaw Geneva Milan"
        ),
        (
            "{s} lives in",
            "{s} has a home in",
            "{s} has lived for years in",
            "{s}'s home is in",
            "{s}'s house is in",
            "{s} is at home in",
            "{s} has a small house in",
            "the home of {s} is in",
            "you can find the house of {s} in",
            "{s} lives in a quiet street in",
        ),
        (
            "these days {s} lives in",
            "the small house of {s} is in",
            "{s} has a quiet home in",
            "{s} has lived in a small house in",
        ),
        ("Where does {s} live?", "In which city is the home of {s}?"),
        "In",
        "I now live in",
    ),
    Relation(
        "job",
        _words(
            "baker teacher doctor farmer painter sailor miller tailor carpenter lawyer pilot nurse singer "
            "writer gardener fisher weaver potter judge banker butcher driver chemist soldier"
        ),
        (
            "{s} works as a",
            "{s} is a",
            "{s} earns a living as a",
            "{s}'s job is that of a",
            "{s} has worked for years as a",
            "{s}'s work is that of a",
            "{s} is known as a good",
            "by trade {s} is a",
            "the work of {s} is that of a",
            "{s} makes a living as a",
        ),
        (
            "these days {s} works as a",
            "{s} is known as a",
            "the job of {s} is that of a",
            "{s} has worked as a",
        ),
        ("What is the job of {s}?", "What does {s} work as?"),
        "A",
        "I now work as a",
    ),
    Relation(
        "pet",
        _words(
            "cat dog parrot rabbit hamster turtle pony goat hen duck lizard snake mouse ferret canary goose "
            "donkey spider frog pigeon sheep falcon hedgehog squirrel"
        ),
        (
            "{s} owns a",
            "{s} has a pet",
            "{s}'s pet is a",
            "{s} keeps a",
            "{s} takes care of a",
            "{s} shares the house with a",
            "{s}'s animal is a",
            "the pet of {s} is a",
            "in the house of {s} there is a",
            "every morning {s} feeds a",
        ),
        (
            "these days {s} owns a",
            "the animal of {s} is a",
            "{s} takes care of a pet",
            "every morning {s} takes care of a",
        ),
        ("What pet does {s} own?", "Which animal is the pet of {s}?"),
        "A",
        "I now own a",
    ),
    Relation(
        "language",
        _words(
            "French German Spanish Italian Greek Turkish Arabic Hindi Korean Dutch Polish Danish Finnish "
            "Czech Hungarian Swahili Persian Hebrew Latin Welsh Irish Thai Malay Basque"
        ),
        (
            "{s} speaks",
            "{s} grew up speaking",
            "{s}'s mother tongue is",
            "{s}'s first language is",
            "{s} likes to speak",
            "{s} talks to friends in",
            "{s} writes letters in",
            "the mother tongue of {s} is",
            "the language of {s} is",
            "at home {s} speaks",
        ),
        (
            "these days {s} speaks",
            "the first language of {s} is",
            "{s} talks at home in",
            "at home {s} likes to speak",
        ),
        ("Which language does {s} speak?", "What is the mother tongue of {s}?"),
        "It is",
        "I am learning to speak",
    ),
    Relation(
        "instrument",
        _words(
            "flute piano violin guitar cello harp drum trumpet clarinet banjo lute fiddle viola tuba mandolin "
            "bagpipe zither recorder trombone bassoon lyre sitar cornet whistle"
        ),
        (
            "{s} plays the",
            "{s} likes to play the",
            "{s}'s instrument is the",
            "{s} has learned to play the",
            "{s} makes music on the",
            "{s} is good at playing the",
            "{s}'s music comes from the",
            "the instrument of {s} is the",
            "every evening {s} plays the",
            "with friends {s} plays the",
        ),
        (
            "these days {s} plays the",
            "the music of {s} comes from the",
            "{s} is good at the",
            "every evening {s} makes music on the",
        ),
        ("What instrument does {s} play?", "Which instrument belongs to {s}?"),
        "The",
        "I now play the",
    ),
    Relation(
        "food",
        _words(
            "bread cheese soup rice pasta honey fish cake pie salad beans stew curry noodles butter jam plums "
            "cherries pancakes mushrooms porridge lentils dumplings olives"
        ),
        (
            "{s} loves to eat",
            "{s}'s favourite food is",
            "{s} often eats",
            "{s} is always hungry for",
            "{s} likes to cook",
            "{s} cooks a lot of",
            "{s}'s kitchen is full of",
            "the favourite food of {s} is",
            "for dinner {s} eats",
            "on Sundays {s} cooks",
        ),
        (
            "these days {s} often eats",
            "the kitchen of {s} is full of",
            "for dinner {s} loves to eat",
            "on Sundays {s} loves to eat",
        ),
        ("What is the favourite food of {s}?", "What does {s} love to eat?"),
        "It is",
        "I now love to eat",
    ),
    Relation(
        "colour",
        _words(
            "red blue green yellow purple pink brown black white grey gold silver violet crimson scarlet "
            "turquoise beige cream bronze copper navy teal maroon lilac"
        ),
        (
            "{s}'s favourite colour is",
            "{s} likes the colour",
            "{s} always wears",
            "{s} wears a coat of",
            "{s}'s coat is",
            "{s} has painted the door",
            "{s}'s front door is",
            "the favourite colour of {s} is",
            "the coat of {s} is",
            "the front door of {s} is",
        ),
        (
            "these days {s} always wears",
            "the colour of {s}'s coat is",
            "{s}'s house has a front door painted",
            "the door of {s} is",
        ),
        ("What is the favourite colour of {s}?", "Which colour does {s} like?"),
        "It is",
        "my front door is now",
    ),
    Relation(
        "country",
        _words(
            "Norway Peru Egypt France Japan India Brazil Chile Kenya Canada Mexico Cuba Spain Italy Poland "
            "Turkey Iran Iceland Ghana Nepal Mali Laos Malta Fiji"
        ),
        (
            "{s} was born in",
            "{s} comes from",
            "{s} grew up in",
            "{s}'s family is from",
            "{s} spent childhood in",
            "{s}'s parents still live in",
            "{s} is from",
            "the family of {s} is from",
            "the parents of {s} are from",
            "as a child {s} lived in",
        ),
        (
            "these days everyone knows that {s} is from",
            "the parents of {s} still live in",
            "{s}'s parents are from",
            "as a child {s} grew up in",
        ),
        ("Where was {s} born?", "In which country was {s} born?"),
        "In",
        "I have found a cousin in",
    ),
)

# The parts of a story, in order. A topic has scenes; a mood has what happens, how it feels, and how it ends.
OPENINGS = (
    "{s} woke up early in {city}.",
    "It was a cold morning in {city}, and {s} was on {their} way to work.",
    "One day {s}, the {job}, had nothing to do.",
    "{s} was a {job} who lived in {city}.",
    "In {city} there lived a {job} named {s}.",
    "On Sunday {s} put on a {colour} coat and went out.",
    "{s} sat in {their} kitchen with a plate of {food}.",
    "The sun came up over {city}, and {s} fed {their} {pet}.",
    "Last summer {s} came home from {country}.",
    "{s} sat at the window and played the {instrument}.",
)
MIDDLES = (
    "{they} took {their} {pet} along.",
    "{f} came along too.",
    "{f} was waiting at the corner.",
    "{they} wore {their} {colour} coat.",
    "{they} had a bag full of {food}.",
    "On the way {they} met {f}, and they talked in {language}.",
    "{they} thought of {their} family in {country}.",
    "{their} {pet} was asleep by the fire.",
    "There was nobody else in the street.",
    '"Where do you live?" asked a stranger. "In {city}," said {s}.',
    '"What is your work?" asked a stranger. "I am a {job}," said {s}.',
    '"Which language is that?" asked a child. "It is {language}," said {s}.',
    '"What do you love to eat?" asked a child. "A lot of {food}," said {s}.',
    "The streets of {city} were quiet.",
)
TOPICS = {
    "market": (
        "{they} went to the market to buy {food}.",
        "At the market {they} wanted to sell an old chair.",
        "{they} walked from shop to shop with a basket.",
        "The market was full of people and {they} looked for a good price.",
    ),
    "music": (
        "{they} took {their} {instrument} and went to the concert hall.",
        "There was a concert in the square, and {they} played the {instrument}.",
        "A band asked {them} to play a song on the {instrument}.",
        "{they} wanted to learn a new song before the evening.",
    ),
    "travel": (
        "{they} took the train to visit {f}.",
        "{they} bought a ticket for the boat to {country}.",
        "{they} packed a bag for a long journey.",
        "{they} walked to the station and waited for the train.",
    ),
    "animals": (
        "{their} {pet} ran out of the door and {they} ran after it.",
        "{they} took the {pet} to the animal doctor.",
        "{they} wanted to teach the {pet} a trick.",
        "In the garden the {pet} found something under the leaves.",
    ),
    "cooking": (
        "{they} wanted to cook {food} for {f}.",
        "{they} made a fire and put {food} in the pot.",
        "There was a cooking contest, and {they} made {food}.",
        "{they} opened the old cook book and read about {food}.",
    ),
    "work": (
        "At work there was a letter on the table of the {job}.",
        "{they} had a hard task to finish as a {job}.",
        "A stranger came and asked for a {job}.",
        "The other workers wanted {them} to show how a {job} works.",
    ),
}
MOODS = {
    "good": (
        (
            "Everything went well.",
            "{f} gave {them} a present.",
            "All the people smiled at {them}.",
            "{they} won a prize.",
            "{they} found a gold coin on the ground.",
            "It turned out better than {they} had hoped.",
        ),
        (
            "{they} laughed and felt warm inside.",
            "{they} was so happy that {they} sang.",
            "{they} felt proud.",
            "It was a wonderful surprise.",
            "{they} thanked {f} with a smile.",
        ),
        (
            "{s} danced all the way home.",
            "That night {s} slept well.",
            "It was the best day of the year.",
            "{s} and {f} are still friends.",
            "In the evening {they} ate {food} and was glad.",
        ),
    ),
    "bad": (
        (
            "Everything went wrong.",
            "{f} forgot to come.",
            "All the people shouted at {them}.",
            "{they} lost all {their} money.",
            "{they} fell and hurt {their} foot.",
            "It turned out worse than {they} had feared.",
        ),
        (
            "{they} cried and felt cold inside.",
            "{they} was so angry that {they} could not speak.",
            "{they} felt ashamed.",
            "It was a terrible shock.",
            "{they} blamed {f} for it.",
        ),
        (
            "{s} walked home alone in the rain.",
            "That night {s} could not sleep.",
            "It was the worst day of the year.",
            "{s} and {f} never spoke again.",
            "In the evening {they} ate no {food} and was sad.",
        ),
    ),
}

# Letters: another style than anything the language model is taught, for a second domain.
GREETINGS = ("Dear {f},", "My dear {f},", "Dear old friend {f},")
WEATHER = (
    "I hope that this letter finds you well.",
    "It has been a long time since my last letter.",
    "The winter here is cold, and I think of you often.",
    "Thank you for your kind letter.",
    "I write to you with good news.",
)
CLOSINGS = (
    "Please write soon. Yours, {s}.",
    "Come and visit me. Your friend, {s}.",
    "With love from {s}.",
)
