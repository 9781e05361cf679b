"""Inflected forms that the rules of `morphology` do not give."""

PLURALS = {"joven": "jóvenes", "sofá": "sofás"}

PARTICIPLES = {
    "leer": "leído",
    "romper": "roto",
    "traer": "traído",
}

# Stems of the present tense outside "nosotros".
PRESENT_STEMS = {
    "adquirir": "adquier",
    "defender": "defiend",
    "despedir": "despid",
    "despertar": "despiert",
    "elegir": "elig",
    "encontrar": "encuentr",
    "fotografiar": "fotografí",
    "mostrar": "muestr",
    "perder": "pierd",
    "perseguir": "persigu",
    "probar": "prueb",
    "seguir": "sigu",
}

# Stems of the third persons of the preterite.
PAST_E_TO_I = {"despedir": "despid", "elegir": "elig", "perseguir": "persigu", "seguir": "sigu"}

IRREGULAR_FORMS = {
    ("traer", "present", "1s"): "traigo",
    ("traer", "past", "1s"): "traje",
    ("traer", "past", "3s"): "trajo",
    ("traer", "past", "1p"): "trajimos",
    ("traer", "past", "3p"): "trajeron",
    ("leer", "past", "3s"): "leyó",
    ("leer", "past", "1p"): "leímos",
    ("leer", "past", "3p"): "leyeron",
}
