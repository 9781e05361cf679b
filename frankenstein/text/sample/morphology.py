"""Spanish inflection by rule, with listed exceptions: plurals, feminines, verb forms, articles, numbers."""

from frankenstein.text.sample.exceptions import (
    IRREGULAR_FORMS,
    PARTICIPLES,
    PAST_E_TO_I,
    PLURALS,
    PRESENT_STEMS,
)

_UNACCENT = str.maketrans("áéíóú", "aeiou")
_ENDINGS = {
    ("ar", "present"): {"1s": "o", "3s": "a", "1p": "amos", "3p": "an"},
    ("er", "present"): {"1s": "o", "3s": "e", "1p": "emos", "3p": "en"},
    ("ir", "present"): {"1s": "o", "3s": "e", "1p": "imos", "3p": "en"},
    ("ar", "past"): {"1s": "é", "3s": "ó", "1p": "amos", "3p": "aron"},
    ("er", "past"): {"1s": "í", "3s": "ió", "1p": "imos", "3p": "ieron"},
    ("ir", "past"): {"1s": "í", "3s": "ió", "1p": "imos", "3p": "ieron"},
    ("ar", "imperfect"): {"1s": "aba", "3s": "aba", "1p": "ábamos", "3p": "aban"},
    ("er", "imperfect"): {"1s": "ía", "3s": "ía", "1p": "íamos", "3p": "ían"},
    ("ir", "imperfect"): {"1s": "ía", "3s": "ía", "1p": "íamos", "3p": "ían"},
}
_FUTURE = {"1s": "é", "3s": "á", "1p": "emos", "3p": "án"}
_HAVE = {"1s": "he", "3s": "ha", "1p": "hemos", "3p": "han"}
_BE = {
    "present": {"3s": "es", "3p": "son"},
    "past": {"3s": "fue", "3p": "fueron"},
    "imperfect": {"3s": "era", "3p": "eran"},
    "future": {"3s": "será", "3p": "serán"},
    "perfect": {"3s": "ha sido", "3p": "han sido"},
}
# Feminine nouns that begin with a stressed a take "el" and "un" in the singular.
_STRESSED_A = frozenset({"águila", "hacha", "agua", "arma", "aula"})
_ARTICLES = {
    "definite": {"m1": "el", "f1": "la", "m2": "los", "f2": "las"},
    "indefinite": {"m1": "un", "f1": "una", "m2": "unos", "f2": "unas"},
    "none": {"m1": "ningún", "f1": "ninguna", "m2": "ningún", "f2": "ninguna"},
    "some": {"m1": "algún", "f1": "alguna", "m2": "algunos", "f2": "algunas"},
    "several": {"m1": "varios", "f1": "varias", "m2": "varios", "f2": "varias"},
    "all": {"m1": "todo el", "f1": "toda la", "m2": "todos los", "f2": "todas las"},
    "bare": {"m1": "", "f1": "", "m2": "", "f2": ""},
}
NUMBERS = ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez", "once")


def plural(word: str) -> str:
    """The plural of a noun or adjective."""
    if word in PLURALS:
        return PLURALS[word]
    if word[-1] in "aeiouáéó":
        return word + "s"
    if word.endswith("z"):
        return word[:-1] + "ces"
    if word[-2] in "áéíóú" and word[-1] in "ns":
        return word[:-2] + word[-2:].translate(_UNACCENT) + "es"
    return word + "es"


def adjective(word: str, gender: str, many: bool) -> str:
    """An adjective or participle (given in the masculine singular) that agrees with a noun."""
    if gender == "f":
        if word.endswith("o"):
            word = word[:-1] + "a"
        elif word.endswith(("dor", "tor")):
            word += "a"
    return plural(word) if many else word


def article(kind: str, noun: str, gender: str, many: bool) -> str:
    """Article or determiner before a noun; kind is a key of the table of articles."""
    if gender == "f" and not many and noun in _STRESSED_A and kind in ("definite", "indefinite", "none"):
        gender = "m"
    return _ARTICLES[kind][gender + ("2" if many else "1")]


def number(value: int, gender: str = "m", digits: bool = False) -> str:
    """A number of 1 to 11 in words (feminine "una" only for 1), or in digits."""
    if digits:
        return str(value)
    if value == 1:
        return "una" if gender == "f" else "un"
    return NUMBERS[value]


def _soften(stem: str, ending: str, infinitive: str) -> str:
    """Keep the sound of the stem's last consonant before the ending (busqué, pagué, empecé; recojo, sigo)."""
    if ending[0] in "eé" and infinitive.endswith("ar"):
        for last, kept in (("c", "qu"), ("g", "gu"), ("z", "c")):
            if stem.endswith(last):
                return stem[:-1] + kept
    if ending[0] in "oa" and not infinitive.endswith("ar"):
        if stem.endswith("gu"):
            return stem[:-1]
        if stem.endswith("g"):
            return stem[:-1] + "j"
    return stem


def verb(infinitive: str, tense: str, person: str = "3s") -> str:
    """A finite form; tense is present, past, imperfect, future or perfect; person is 1s, 3s, 1p or 3p."""
    if tense == "perfect":
        return f"{_HAVE[person]} {participle(infinitive)}"
    if tense == "future":
        return infinitive + _FUTURE[person]
    irregular = IRREGULAR_FORMS.get((infinitive, tense, person))
    if irregular:
        return irregular
    stem, group = infinitive[:-2], infinitive[-2:]
    if tense == "present" and person != "1p":
        stem = PRESENT_STEMS.get(infinitive, stem)
    if tense == "past" and person in ("3s", "3p"):
        stem = PAST_E_TO_I.get(infinitive, stem)
    ending = _ENDINGS[group, tense][person]
    return _soften(stem, ending, infinitive) + ending


def participle(infinitive: str, gender: str = "m", many: bool = False) -> str:
    """The past participle, agreeing as an adjective does."""
    regular = infinitive[:-2] + ("ado" if infinitive.endswith("ar") else "ido")
    return adjective(PARTICIPLES.get(infinitive, regular), gender, many)


def be(tense: str, many: bool) -> str:
    """The third person of "ser", the auxiliary of the passive."""
    return _BE[tense]["3p" if many else "3s"]


def pronoun(gender: str, many: bool) -> str:
    """The object pronoun lo, la, los or las."""
    return ("lo" if gender == "m" else "la") + ("s" if many else "")


def conjunction(following: str) -> str:
    """ "y", or "e" before a word that begins with the sound i."""
    return "e" if following.startswith(("i", "hi", "í")) and not following.startswith("hie") else "y"


def sentence(*parts: str) -> str:
    """One sentence from its parts: single spaces, contractions al and del, capital letter, full stop."""
    text = " ".join(part for part in parts if part)
    text = f" {text}".replace(" a el ", " al ").replace(" de el ", " del ").strip()
    return text[0].upper() + text[1:] + "."
